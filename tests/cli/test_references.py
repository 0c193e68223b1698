"""The command edit with a reference and with a budget."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.cli.parser import main
from tests.editing.test_reference import START, TUNED, factors


@pytest.fixture
def saved(tmp_path):
    """Files of a start, of its fine-tune, and of factors."""
    for name, net in (("start", START), ("tuned", TUNED)):
        tensors = {key: tensor.clone() for key, tensor in net.state_dict().items()}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    factors().save(tmp_path / "factors.safetensors")
    return tmp_path


def run(saved, *options):
    paths = ["--checkpoint", saved / "tuned.safetensors", "--factors", saved / "factors.safetensors"]
    main([str(argument) for argument in ("edit", *paths, "--out", saved / "edited.safetensors", *options)])


@pytest.mark.parametrize("options", [["--budget", "0.01", "--soft"], ["--energy", "0.7"]], ids=["budget", "energy"])
def test_a_reference_edits_the_update(options, saved, capsys):
    run(saved, "--reference", saved / "start.safetensors", "--scale", "0.8", *options)
    shown = capsys.readouterr().out
    assert "Edited updates since 'start.safetensors'" in shown
    assert "6 other weights that fine-tuning moved go back, too" in shown
    editor = CurvatureEditor(budget=0.01, soft=True) if "--soft" in options else CurvatureEditor(0.7)
    expected, _ = editor.based_on(START, 0.8).edit_state_dict(
        TUNED.state_dict(), KroneckerFactors.load(saved / "factors.safetensors")
    )
    edited = load_file(saved / "edited.safetensors")
    assert all(torch.allclose(edited[name], tensor) for name, tensor in expected.items())
    main(["inspect", str(saved / "edited.safetensors"), "--json"])
    edit = json.loads(capsys.readouterr().out)["edit"]
    assert edit["reference"]["name"] == "start.safetensors"
    assert edit.get("budget") == (0.01 if "--soft" in options else None)
    main(["inspect", str(saved / "edited.safetensors")])
    assert "body.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "editor",
    [CurvatureEditor(0.9, scope="model"), CurvatureEditor(budget=0.01, scope="layer", soft=True)],
    ids=["energy", "budget"],
)
def test_scores_are_compared_over_the_model_or_within_each_layer(editor, saved, capsys):
    options = ["--energy", "0.9"] if editor.budget is None else ["--budget", "0.01", "--soft"]
    run(saved, *options, "--scope", editor.scope)
    expected, _ = editor.edit_state_dict(TUNED.state_dict(), KroneckerFactors.load(saved / "factors.safetensors"))
    edited = load_file(saved / "edited.safetensors")
    assert all(torch.allclose(edited[name], tensor) for name, tensor in expected.items())
    capsys.readouterr()
    main(["inspect", str(saved / "edited.safetensors"), "--json"])
    assert json.loads(capsys.readouterr().out)["edit"]["scope"] == editor.scope
    with pytest.raises(SystemExit, match="--forget edits each layer by itself: leave --scope out"):
        run(saved, "--forget", "list.jsonl", "--scope", "model", "--overwrite")


def test_the_predicted_loss_is_in_the_plan_and_the_json(saved, capsys):
    run(saved, "--budget", "0.01", "--dry-run", "--json")
    plan = json.loads(capsys.readouterr().out)
    losses = [layer["predicted_loss"] for layer in plan["report"]["layers"].values()]
    assert 0 < sum(losses) <= 0.01
    run(saved, "--budget", "0.01", "--json")
    assert json.loads(capsys.readouterr().out)["predicted_loss"] == pytest.approx(sum(losses))


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_the_last_line_warns_of_ruin(option, saved, capsys):
    run(saved, "--energy", "0.05", *option)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("This edit is likely to ruin the model")


@pytest.mark.parametrize("other", [["--energy", "0.7"], ["--perplexity", "1.1"], ["--forget", "list.jsonl"]])
def test_a_budget_stands_alone(other, saved):
    with pytest.raises(SystemExit, match="--budget says how strong the edit is"):
        run(saved, "--budget", "0.01", *other)


def test_a_scale_is_of_an_update(saved):
    run(saved, "--reference", saved / "start.safetensors", "--energy", "0.7", "--scale", "0.5")
    expected, _ = CurvatureEditor(0.7).based_on(START, 0.5).edit_state_dict(TUNED.state_dict(), factors())
    edited = load_file(saved / "edited.safetensors")
    assert all(torch.allclose(edited[name], tensor) for name, tensor in expected.items())
    with pytest.raises(SystemExit, match="--scale is used by --reference alone"):
        run(saved, "--scale", "0.5", "--overwrite")


def test_a_reference_that_is_missing_is_named(saved):
    with pytest.raises(SystemExit, match=r"none.safetensors: no such file"):
        run(saved, "--reference", saved / "none.safetensors")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], CurvatureEditor(budget=0.002)),
        (["--layers", "body.2"], CurvatureEditor(budget=0.02, layers=["body.2"])),
        (["--soft"], CurvatureEditor(budget=0.0003, soft=True)),
        (["--reference", "start.safetensors"], CurvatureEditor(budget=0.0003, soft=True).based_on(START)),
    ],
    ids=["several", "one", "soft", "update"],
)
def test_without_a_strength_the_edit_is_a_careful_one(options, expected, saved, capsys):
    run(saved, *(saved / option if option.startswith("start") else option for option in options))
    factors = KroneckerFactors.load(saved / "factors.safetensors")
    edited, report = expected.edit_state_dict(TUNED.state_dict(), factors)
    written = load_file(saved / "edited.safetensors")
    assert all(torch.allclose(written[name], tensor) for name, tensor in edited.items())
    assert 0 < report.predicted_loss <= 1.001 * expected.budget
