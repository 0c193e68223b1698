"""LightningCLI: the package's examples, a user's own script, help."""

import subprocess
import sys

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_curvature import KFACEditCallback, KroneckerFactors
from lightning_curvature.cli import main
from lightning_curvature.text.jsonl import write_jsonl
from lightning_curvature.text.lit import PretrainedLM
from tests import language, models

QUIET = ("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")


@pytest.mark.filterwarnings("ignore:.*wandb.*")
def test_digits_from_yaml_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", "digits.yaml", "--trainer.check_val_every_n_epoch", "1", *QUIET]
    main([*fit, "--trainer.max_epochs", "2"])
    assert list(KroneckerFactors.load("factors.safetensors")) == ["model.blocks.1.fc2"]
    (edited,) = tmp_path.rglob("*-edited.ckpt")
    assert torch.load(edited, weights_only=True)["lightning_curvature"]["method"] == "kfac"
    (config,) = tmp_path.rglob("config.yaml")
    assert yaml.safe_load(config.read_text())["trainer"]["callbacks"][0]["init_args"]["energy"] == 0.85


def test_validate_collects_over_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    language.model("llama").save_pretrained("runs/text/model")
    language.tokenizer().save_pretrained("runs/text/model")
    write_jsonl("runs/text/train.jsonl", [{"text": language.words(language.tokens(1, 300)[0].tolist())}])
    main(["validate", "--config", "text.yaml", *QUIET, "--data.init_args.length", "32"])
    found = KroneckerFactors.load("runs/text/factors-from-validation.safetensors")
    assert len(found) == 6
    assert found.provenance["loop"] == "validation"
    assert next(iter(found.values())).num_inputs == 9 * 31


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
def test_a_saved_model_is_trained_further_and_edited(tmp_path, monkeypatch):
    """And goes on from a checkpoint, with the factors beside it."""
    monkeypatch.chdir(tmp_path)
    language.model("llama").save_pretrained("runs/text/model")
    language.tokenizer().save_pretrained("runs/text/model")
    write_jsonl("runs/text/train.jsonl", [{"text": language.words(language.tokens(1, 300)[0].tolist())}])
    fit = ["fit", "--config", "text.yaml", *QUIET, "--data.init_args.length", "32"]
    main([*fit, "--trainer.max_epochs", "1"])
    (edited,) = tmp_path.rglob("*-edited.ckpt")
    assert PretrainedLM.load_from_checkpoint(edited, weights_only=True).lr == 1e-5
    factors = "runs/text/factors-from-validation.safetensors"
    assert next(iter(KroneckerFactors.load(factors).values())).num_inputs == 9 * 31
    main([*fit, "--trainer.max_epochs", "2", "--ckpt_path", str(edited).replace("-edited", "")])
    assert next(iter(KroneckerFactors.load(factors).values())).num_inputs == 2 * 9 * 31


def test_print_config_shows_every_argument_with_its_help():
    command = [sys.executable, "-m", "lightning_curvature", "fit", "--config=digits.yaml"]
    shown = subprocess.run([*command, "--print_config"], capture_output=True, text=True, check=True).stdout
    callback = yaml.safe_load(shown)["trainer"]["callbacks"][0]["init_args"]
    assert callback["fisher"] == "sketched"
    assert {"layers", "energy", "window", "probes", "loop", "save_factors"} <= set(callback)
    help_text = subprocess.run(
        [*command[:4], "--trainer.callbacks.help", "lightning_curvature.KFACEditCallback"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "Share of the curvature mass that the edit keeps" in " ".join(help_text.split())


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")  # it sees pytest's own arguments
def test_a_users_own_script_takes_the_callback_from_the_command_line(tmp_path):
    cli = LightningCLI(
        models.Classifier,
        run=False,
        save_config_callback=None,
        args=["--trainer.callbacks+=lightning_curvature.KFACEditCallback", "--trainer.callbacks.energy=0.7",
              "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"],
    )  # fmt: skip
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, KFACEditCallback)]
    assert callback.editor.energy == 0.7
