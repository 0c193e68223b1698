"""Edits of LoRA adapters in modules and state dicts."""

import copy
import dataclasses
import math

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.baselines import InterpolationEditor, RandomBasisEditor, SVDEditor
from tests.editing.test_reference import EDITORS, IDS
from tests.support import processes
from tests.support.processes import here

SIDES = {"0": (6, 4), "2": (5, 6)}
INSIDE = "base_model.model."


def adapted(seed=0, **options):
    """A small network with trained-looking adapters on its two linear layers."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False, **options})
    return peft.get_peft_model(net, config).double()


def factors(names=f"{INSIDE}{{}}.base_layer", sides=SIDES):
    """Factors of full rank of some layers."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, side in sides.items():
        G, A = (
            rows.T @ rows / 40 for rows in (torch.randn(40, d, dtype=torch.float64, generator=generator) for d in side)
        )
        made[names.format(name)] = LayerFactors(A=A, G=G, num_inputs=40, num_gradients=40)
    return KroneckerFactors(made)


def update(model, name, adapter="default"):
    layer = model.get_submodule(f"{INSIDE}{name}")
    return layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight


def is_adapter(name):
    return ".lora_" in name


def edited_products(editor, model):
    """What an editor makes of the updates, as matrices of any rank."""
    weights = {name: update(model, name).detach() for name in SIDES}
    zeros = {f"{name}.weight": torch.zeros(sides) for name, sides in SIDES.items()}
    state_dict = {f"{name}.weight": weight for name, weight in weights.items()}
    return editor.edit_state_dict(state_dict, factors("{}"), reference=zeros)


@pytest.mark.parametrize("editor", EDITORS, ids=IDS)
def test_the_update_is_edited_and_the_base_stays(editor):
    """With an adapter of full rank, nothing is lost."""
    model = adapted(r=6)
    before = copy.deepcopy(model)
    expected, expected_report = edited_products(editor, model)
    report = editor.edit(model, factors())
    for name in SIDES:
        torch.testing.assert_close(update(model, name), expected[f"{name}.weight"], rtol=1e-9, atol=1e-12)
        layer = report.layers[f"{INSIDE}{name}.base_layer"]
        assert layer.rank_loss == pytest.approx(0, abs=1e-18)
        assert layer.predicted_loss == pytest.approx(expected_report.layers[name].predicted_loss, rel=1e-6)
        assert layer.update_kept == pytest.approx(expected_report.layers[name].update_kept)
        A, B = (
            getattr(model.get_submodule(f"{INSIDE}{name}"), side)["default"].weight for side in ("lora_A", "lora_B")
        )
        torch.testing.assert_close(A.norm(), B.norm())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name]) != is_adapter(name), name


@pytest.mark.parametrize("names", ["{}", "model.{}", f"{INSIDE}{{}}", f"{INSIDE}{{}}.base_layer"])
def test_interpolation_keeps_a_share_of_the_update(names):
    """Whatever model the factors were collected on."""
    model = adapted()
    before = {name: update(model, name).detach() for name in SIDES}
    report = InterpolationEditor(0.25).edit(model, factors(names))
    assert report.update_kept == pytest.approx(0.25)
    assert report.reference == "base"
    for name in SIDES:
        torch.testing.assert_close(update(model, name), 0.25 * before[name], rtol=1e-9, atol=1e-12)


def test_the_whole_energy_changes_nothing():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    report = CurvatureEditor(1.0).edit(model, factors())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(edit.changed == 0 and edit.update_kept == 1 for edit in report.layers.values())


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_and_rank_are_those_of_each_layer(rslora):
    model = adapted(r=2, lora_alpha=3, rank_pattern={"0": 4}, alpha_pattern={"2": 7}, use_rslora=rslora)
    alphas, ranks = {"0": 3, "2": 7}, {"0": 4, "2": 2}
    before = {name: update(model, name).detach() for name in SIDES}
    InterpolationEditor(0.5).edit(model, factors())
    for name in SIDES:
        layer = model.get_submodule(f"{INSIDE}{name}")
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert len(A) == ranks[name]
        scaling = alphas[name] / (math.sqrt(ranks[name]) if rslora else ranks[name])
        torch.testing.assert_close(scaling * B @ A, 0.5 * before[name], rtol=1e-9, atol=1e-12)


def test_what_the_rank_cannot_hold_is_reported():
    """The matrix that is stored is the best of its rank for the predicted loss, or for the norm."""
    for editor in (CurvatureEditor(0.7, soft=True), SVDEditor(0.7), RandomBasisEditor(0.7)):
        model = adapted(r=1)
        before = update(model, "0").detach()
        wanted, _ = edited_products(editor, model)
        report = editor.edit(model, factors())
        layer, of_layer = report.layers[f"{INSIDE}0.base_layer"], factors()[f"{INSIDE}0.base_layer"]
        after, target = update(model, "0").detach(), wanted["0.weight"]
        share = float((after - target).square().sum() / target.square().sum())
        assert layer.rank_loss == pytest.approx(share, abs=1e-15)
        change = after - before
        loss = 0.5 * float(torch.trace(change.T @ of_layer.G @ change @ of_layer.A))
        assert layer.predicted_loss == pytest.approx(loss)
        assert layer.update_kept == pytest.approx(float(after.norm() / before.norm()))
        assert torch.linalg.matrix_rank(after) == 1
        U, S, Vh = torch.linalg.svd(target)
        plain = S[0] * torch.outer(U[:, 0], Vh[0])
        gap = [float(torch.trace((x - target).T @ of_layer.G @ (x - target) @ of_layer.A)) for x in (after, plain)]
        if editor.reads_factors:
            assert share > 0.001
            assert gap[0] < gap[1]
            assert f"loses at most {max(e.rank_loss for e in report.layers.values()):.1%}" in str(report)
        else:
            torch.testing.assert_close(after, plain)


def test_a_budget_is_one_for_all_adapters():
    model = adapted(r=6)
    report = CurvatureEditor(budget=0.01, soft=True).edit(model, factors())
    assert report.predicted_loss == pytest.approx(0.01, rel=0.05)
    costs = [edit.predicted_loss for edit in report.layers.values()]
    assert len(costs) == 2
    assert min(costs) > 0


def test_the_edit_is_undone_behind_a_with_block():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with CurvatureEditor(0.7).applied(model, factors()):
        assert not torch.equal(update(model, "0"), update(adapted(seed=1), "0"))
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == {name for name in before if is_adapter(name)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_dict_is_edited_as_its_module(dtype):
    model = adapted().to(dtype)
    before = model.state_dict()
    saved = {name: tensor.clone() for name, tensor in before.items()}
    new, report = CurvatureEditor(0.7).edit_state_dict(saved, factors(), module=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.items())
    assert CurvatureEditor(0.7).edit(model, factors()) == report
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, new[name])
        assert (new[name] is saved[name]) != is_adapter(name)
    with pytest.raises(ValueError, match=r"Layer .*0.base_layer' is the base under a LoRA adapter.*module="):
        CurvatureEditor(0.7).edit_state_dict(saved, factors())
    del saved[f"{INSIDE}0.lora_A.default.weight"]
    with pytest.raises(ValueError, match="lacks tensors of the module's adapters"):
        CurvatureEditor(0.7).edit_state_dict(saved, factors(), module=model)


def test_a_layer_without_an_adapter_stays():
    model = adapted(target_modules=["0"])
    names = {**factors("{}", {"0": SIDES["0"]}), **factors(f"{INSIDE}{{}}", {"2": SIDES["2"]})}
    before = copy.deepcopy(model.state_dict())
    report = CurvatureEditor(0.7).edit(model, KroneckerFactors(names))
    assert list(report.layers) == ["0"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if is_adapter(name)}
    with pytest.raises(ValueError, match=r"None of the layers .*2' has an adapter.*disable_adapter_layers"):
        CurvatureEditor(0.7).edit(model, factors(f"{INSIDE}{{}}", {"2": SIDES["2"]}))


def test_the_base_can_be_edited_with_its_adapters_disabled():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with model.disable_adapter():
        CurvatureEditor(0.7).edit(model, factors())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{INSIDE}{name}.base_layer.weight" for name in SIDES}


COPY = f"{INSIDE}4.modules_to_save.default"


def with_copy():
    model = adapted(modules_to_save=["4"])
    copied = model.get_submodule(COPY)
    copied.weight.data += 1
    copied.bias.data += 1
    every = KroneckerFactors({**factors(), **factors(COPY, {"": (3, 5)})})
    return model, every


def test_a_trained_copy_stays_without_a_reference():
    model, every = with_copy()
    before = copy.deepcopy(model.state_dict())
    report = CurvatureEditor(0.7).edit(model, every)
    assert list(report.skipped) == [COPY]
    assert "modules_to_save" in report.skipped[COPY]
    assert report.skipped[COPY] in str(report)
    assert torch.equal(model.state_dict()[f"{COPY}.weight"], before[f"{COPY}.weight"])


@pytest.mark.parametrize("editor", [CurvatureEditor(0.7), CurvatureEditor(budget=0.5, soft=True), SVDEditor(0.7)])
def test_a_trained_copy_is_edited_with_a_reference(editor):
    model, every = with_copy()
    before = copy.deepcopy(model.state_dict())
    start = adapted().unload().state_dict()
    editor = editor.based_on(start, 0.8)
    new, from_state_dict = editor.edit_state_dict(before, every, module=model)
    report = editor.edit(model, every)
    assert dataclasses.replace(report, others=1) == from_state_dict
    assert set(report.layers) == {*factors(), COPY}
    after = model.state_dict()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{COPY}.weight", f"{COPY}.bias", *filter(is_adapter, before)}
    assert all(torch.equal(new[name], tensor) for name, tensor in after.items())
    torch.testing.assert_close(
        after[f"{COPY}.bias"] - start["4.bias"], torch.full((3,), editor.share_of_others(report)).double()
    )


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)


def two_adapters():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def merged():
    model = adapted()
    model.merge_adapter()
    return model


REFUSED = {
    "DoRA": (lambda: adapted(use_dora=True), "is of the kind DoRA.*merge_and_unload"),
    "bias": (lambda: adapted(lora_bias=True), "is of the kind LoRA with a bias"),
    "PiSSA": (lambda: adapted(init_lora_weights="pissa"), "began as a part of its base.*'pissa'"),
    "several": (two_adapters, "has several active adapters, 'default', 'other'.*set_adapter"),
    "merged": (merged, "'default' is merged into the weight of the base.*unmerge_adapter"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_are_refused(kind):
    make, message = REFUSED[kind]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"Layer '{INSIDE}0.base_layer'.*{message}"):
        CurvatureEditor(0.7).edit(model, factors())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_other_kinds_of_layers_and_methods_are_refused():
    conv = peft.get_peft_model(Convolution(), peft.LoraConfig(target_modules=["conv"]))
    with pytest.raises(ValueError, match=r"Layer .*conv'.* is of the kind Conv2d, on a layer of the kind Conv2d"):
        CurvatureEditor(0.7).edit(conv, factors(f"{INSIDE}conv", {"": (3, 18)}))
    other = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 6)), peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    )
    with pytest.raises(ValueError, match=r"Layer .*0.base_layer'.* is of the kind IA3"):
        CurvatureEditor(0.7).edit(other, factors(sides={"0": SIDES["0"]}))


def test_factors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"Layer .*0.base_layer': factors are for a \[6, 9\] weight"):
        CurvatureEditor(0.7).edit(adapted(), factors(sides={"0": (6, 9)}))


def test_adapters_that_share_a_tensor_are_refused():
    square = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), peft.LoraConfig(r=2, target_modules=["0", "1"])
    )
    first, second = (square.get_submodule(f"{INSIDE}{name}") for name in ("0", "1"))
    second.lora_A["default"].weight = first.lora_A["default"].weight
    with pytest.raises(ValueError, match="have one weight"):
        CurvatureEditor(0.7).edit(square, factors(sides={"0": (4, 4), "1": (4, 4)}))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_an_edited_adapter_is_the_reference_edit_of_the_merged_model(kind):
    """Also where the weight of the base is stored as its transpose."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 6) if kind == "linear" else Conv1D(6, 4)
    base = nn.Sequential(layer).double()
    options = {"r": 4, "target_modules": ["0"], "init_lora_weights": False, "fan_in_fan_out": kind == "conv1d"}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).double()
    merged = copy.deepcopy(model).merge_and_unload()
    of_layer = dataclasses.replace(factors("{}")["0"], transposed=kind == "conv1d")
    expected = CurvatureEditor(0.7).edit(merged, KroneckerFactors({"0": of_layer}), reference=base)
    report = CurvatureEditor(0.7).edit(model, KroneckerFactors({"0": of_layer}))
    after = model.merge_and_unload()
    torch.testing.assert_close(after[0].weight, merged[0].weight, rtol=1e-9, atol=1e-12)
    assert report.update_kept == pytest.approx(expected.update_kept)
    assert report.predicted_loss == pytest.approx(expected.predicted_loss)


def edit_together():
    """Edit on one of several processes, each of which has layers of its own."""
    editor, model = CurvatureEditor(budget=0.01, soft=True), adapted()
    editor.ranks = here()
    report = editor.edit(model, factors())
    return model.state_dict(), report


def test_several_processes_edit_as_one():
    model = adapted()
    report = CurvatureEditor(budget=0.01, soft=True).edit(model, factors())
    for state_dict, its_report in processes.run(2, edit_together):
        assert its_report == report
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(state_dict[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", ["module", "state dict"])
def test_a_start_that_holds_adapters_leaves_their_edit_alone(way):
    """The tensors of an adapter are no weights that are scaled on their own: their product is the update."""
    model, start = adapted(), adapted(3)
    editor = CurvatureEditor(budget=0.5, soft=True)
    expected = copy.deepcopy(model)
    alone = editor.based_on({}, 0.8)
    alone.reference = None
    report = alone.edit(expected, factors())
    assert report.update_kept < 0.75
    editor = editor.based_on(start, 0.8)
    if way == "module":
        editor.edit(model, factors())
        state = model.state_dict()
    else:
        state, _ = editor.edit_state_dict(model.state_dict(), factors(), module=model)
    for name, tensor in expected.state_dict().items():
        if is_adapter(name):
            torch.testing.assert_close(state[name], tensor)
