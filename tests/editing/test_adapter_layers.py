"""Edits of the folders of LoRA adapters."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.baselines import InterpolationEditor, SVDEditor
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.editing.streaming import plan_edit
from tests.support.saved import hashes

SIDES = {"0": (6, 4), "2": (5, 6)}
INSIDE = "base_model.model."


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))


def adapted(**options):
    config = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **options}
    model = peft.get_peft_model(base(), peft.LoraConfig(**config))
    if config.get("modules_to_save"):
        model.get_submodule(f"{INSIDE}4.modules_to_save.default").weight.data += 1
    return model.eval()


def factors(names, sides=SIDES):
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, side in sides.items():
        G, A = (rows.T @ rows / 40 for rows in (torch.randn(40, d, generator=generator) for d in side))
        made[names.format(name)] = LayerFactors(A=A, G=G, num_inputs=40, num_gradients=40)
    return KroneckerFactors(made)


EDITORS = [CurvatureEditor(0.7), CurvatureEditor(budget=0.01, soft=True), SVDEditor(0.7), InterpolationEditor(0.7)]
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": {"rank_pattern": {"0": 3}, "alpha_pattern": {"2": 5}, "use_rslora": True},
    "copy": {"modules_to_save": ["4"]},
}


@pytest.mark.parametrize("editor", EDITORS, ids=["kfac", "budget", "svd", "interpolation"])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_folder_is_edited_as_its_module(editor, kind, tmp_path):
    """Whatever model the factors were collected on, and as peft loads it."""
    model = adapted(**OPTIONS[kind])
    model.save_pretrained(tmp_path / "adapter")
    report = editor.edit_checkpoint(tmp_path / "adapter", factors("{}"), tmp_path / "out")
    live = editor.edit(model, factors(f"{INSIDE}{{}}.base_layer"))
    assert report.reference == live.reference == "base"
    for name in SIDES:
        ours, theirs = report.layers[name], live.layers[f"{INSIDE}{name}.base_layer"]
        assert ours.tensor == f"{INSIDE}{name}.lora_A.weight, {INSIDE}{name}.lora_B.weight"
        for field in ("predicted_loss", "rank_loss", "update_kept", "changed", "relative_change", "energy_kept"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), rel=1e-9, abs=1e-12), field
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "out").eval()
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    inputs = torch.randn(3, 4)
    assert torch.equal(loaded(inputs), model(inputs))


def test_the_folder_says_what_was_done_and_can_go_back(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    before, delta = hashes(tmp_path / "adapter"), tmp_path / "delta.safetensors"
    plan = plan_edit(CurvatureEditor(0.7), tmp_path / "adapter", factors("{}"))
    report = CurvatureEditor(0.7).edit_checkpoint(tmp_path / "adapter", factors("{}"), tmp_path / "out", delta=delta)
    assert plan.report == report
    assert hashes(tmp_path / "adapter") == before
    facts = open_checkpoint(tmp_path / "out").edit_facts
    assert list(facts["layers"]) == ["0", "2"]
    assert facts["reference"] == {"name": "base", "scale": 1.0}
    assert json.loads((tmp_path / "out" / "curvature_edit.json").read_text()) == facts
    assert "Edited weights" in (tmp_path / "out" / "README.md").read_text()
    apply_delta(tmp_path / "out", delta, tmp_path / "back", revert=True)
    assert hashes(tmp_path / "back") == before
    apply_delta(tmp_path / "back", delta, tmp_path / "again", revert=False)
    assert hashes(tmp_path / "again") == hashes(tmp_path / "out")
    # An adapter is replaced as a whole.
    with pytest.warns(UserWarning, match="is edited already"):
        CurvatureEditor(0.7).edit_checkpoint(tmp_path / "out", factors("{}"), tmp_path / "back", overwrite=True)
    assert open_checkpoint(tmp_path / "back").edit_facts["before"] == facts


def test_what_has_no_adapter_stays(tmp_path):
    adapted(target_modules=["0"], modules_to_save=["4"]).save_pretrained(tmp_path / "adapter")
    every = factors("{}", {**SIDES, "4": (3, 5)})
    with pytest.warns(UserWarning, match="modules_to_save"):
        report = CurvatureEditor(0.7).edit_checkpoint(tmp_path / "adapter", every, tmp_path / "out")
    assert list(report.layers) == ["0"]
    assert list(report.skipped) == ["4"]
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "out"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{INSIDE}0.lora_A.weight", f"{INSIDE}0.lora_B.weight"}
    with pytest.raises(ValueError, match=r"None of the layers '2' has an adapter"):
        CurvatureEditor(0.7, layers=["2"]).edit_checkpoint(tmp_path / "adapter", every, tmp_path / "other")


def change(folder, **entries):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


REFUSED = {
    "is of the kind DoRA; .*merge_and_unload": {"use_dora": True},
    "is of the kind IA3; ": {"peft_type": "IA3"},
    r"is of the kind LoRA with a bias \(lora_bias\)": {"lora_bias": True},
    "began as a part of its base .*'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "adapter_config.json does not fit adapter_model.safetensors .*another rank": {"r": 3},
    "adapter_config.json does not fit adapter_model.safetensors": {"rank_pattern": {"(": 2}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_adapters_are_refused(message, tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", **REFUSED[message])
    with pytest.raises(ValueError, match=message):
        CurvatureEditor(0.7).edit_checkpoint(tmp_path / "adapter", factors("{}"), tmp_path / "out")


def test_pickled_adapters_and_references_are_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter, and an adapter is the update since its base"):
        CurvatureEditor(0.7).edit_checkpoint(tmp_path / "adapter", factors("{}"), tmp_path / "out", reference=base())
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    with pytest.raises(ValueError, match=r"adapter_model.bin, which would have to be unpickled.*save_pretrained"):
        CurvatureEditor(0.7).edit_checkpoint(tmp_path / "bin", factors("{}"), tmp_path / "out")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors but no weights"):
        CurvatureEditor(0.7).edit_checkpoint(tmp_path / "adapter", factors("{}"), tmp_path / "out")


def test_factors_say_nothing_of_an_adapter_by_the_weights_of_their_base(tmp_path):
    """They need no --force, although the base that they were collected on is not there to compare."""
    adapted().save_pretrained(tmp_path / "adapter")
    with_weights = {
        name: LayerFactors(
            A=layer.A,
            G=layer.G,
            num_inputs=40,
            num_gradients=40,
            weight={"hash": f"torch.float32 {list(layer.shape)} {'0' * 64}", "sample": [1.0] * 4},
        )
        for name, layer in factors("{}").items()
    }
    report = CurvatureEditor(0.7).edit_checkpoint(
        tmp_path / "adapter", KroneckerFactors(with_weights), tmp_path / "out"
    )
    assert all(edit.changed for edit in report.layers.values())
