"""LightningCLI: the package's examples, a user's own script, help."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_curvature import KFACEditCallback, KroneckerFactors
from lightning_curvature.analysis import flat_shares, layer_activations
from lightning_curvature.cli.parser import main
from lightning_curvature.demos.digits import NoisyDigits
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.storage.jsonl import write_jsonl
from lightning_curvature.text.lit import PretrainedLM
from tests.support import language, models

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


@pytest.mark.filterwarnings("ignore:.*wandb.*")
def test_the_training_images_are_ranked_from_what_a_fit_leaves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(
        [
            "fit",
            "--config",
            "digits.yaml",
            "--trainer.check_val_every_n_epoch",
            "1",
            *QUIET,
            "--trainer.max_epochs",
            "1",
        ]
    )
    (config,) = tmp_path.rglob("config.yaml")
    (checkpoint,) = (path for path in tmp_path.rglob("*.ckpt") if "edited" not in path.name)
    rank = ["detect", "--factors", "factors.safetensors", "--out", "ranked.csv"]
    images = [*rank, "--overwrite", "--checkpoint", str(checkpoint), "--positions", "first", "--config"]
    main([*images, str(config)])
    assert f"{len(NoisyDigits().train)} examples written to ranked.csv" in capsys.readouterr().out
    with Path("ranked.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["rank", "index", "score", "loss", "negative margin", "label", "predicted"]
    assert [row["rank"] for row in rows[:3]] == ["1", "2", "3"]
    model, (pictures, labels, _) = (
        LitViT.load_from_checkpoint(checkpoint, weights_only=True).eval(),
        NoisyDigits().train[:],
    )
    ((layer, factors),) = KroneckerFactors.load("factors.safetensors").items()
    inputs = layer_activations(model, [pictures], model, [layer], slice(0, 1))[layer]
    expected, logits = flat_shares(factors, inputs), model(pictures).detach()
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    order = [int(row["index"]) for row in rows]
    assert sorted(order) == list(range(len(labels)))
    torch.testing.assert_close(torch.tensor(scores).double(), expected[order], atol=1e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(torch.tensor([float(row["loss"]) for row in rows]), loss[order], atol=1e-4, rtol=1e-4)
    for row, index in zip(rows, order, strict=True):
        assert int(row["label"]) == labels[index]
        assert (float(row["negative margin"]) < 0) == (row["label"] == row["predicted"])
    elsewhere = yaml.safe_load(config.read_text())
    elsewhere["trainer"] |= {"accelerator": "tpu", "devices": 8, "strategy": "ddp_spawn"}
    Path("elsewhere.yaml").write_text(yaml.safe_dump(elsewhere))
    main([*images, "elsewhere.yaml"])
    assert f"{len(rows)} examples" in capsys.readouterr().out
    main([*images, "digits.yaml", "--json"])  # the example that was fitted
    assert json.loads(capsys.readouterr().out)["rows"][0]["index"] == order[0]
    with pytest.raises(SystemExit, match="positions must be one of"):
        main([*images, "digits.yaml", "--positions", "last"])
    for wrong in ([], ["--config", "digits.yaml"], [*images[5:], "digits.yaml", "--model", "m"]):
        with pytest.raises(SystemExit, match="for images --config with --checkpoint"):
            main([*rank, "--overwrite", *wrong])


def test_validate_collects_over_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    language.model("llama").save_pretrained("runs/text/model")
    language.tokenizer().save_pretrained("runs/text/model")
    write_jsonl("runs/text/train.jsonl", [{"text": language.words(language.tokens(1, 300)[0].tolist())}])
    main(["validate", "--config", "text.yaml", *QUIET, "--data.init_args.length", "32"])
    factors = KroneckerFactors.load("runs/text/factors-from-validation.safetensors")
    assert len(factors) == 6
    assert factors.provenance["loop"] == "validation"
    assert next(iter(factors.values())).num_inputs == 9 * 31


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:This edit is likely to ruin the model")
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
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "Share of the curvature mass that the edit keeps" in " ".join(help_text.split())


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")  # it sees pytest's own arguments
def test_a_users_own_script_takes_the_callback_from_the_command_line(tmp_path):
    cli = LightningCLI(
        models.Classifier,
        run=False,
        save_config_callback=None,
        args=[
            "--trainer.callbacks+=lightning_curvature.KFACEditCallback",
            "--trainer.callbacks.energy=0.7",
            "--trainer.logger=false",
            f"--trainer.default_root_dir={tmp_path}",
        ],
    )
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, KFACEditCallback)]
    assert callback.editor.energy == 0.7
