"""Edits of the update of a fine-tune."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.baselines import GradientAscent, InterpolationEditor, RandomBasisEditor, SVDEditor
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.editing.streaming import plan_edit

SIDES = {"body.0": (6, 4), "body.2": (5, 6)}


def network(seed):
    torch.manual_seed(seed)
    net = nn.Module()
    net.embedding = nn.Embedding(7, 4)
    net.body = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.LayerNorm(5))
    net.head = nn.Linear(4, 7, bias=False)
    net.head.weight = net.embedding.weight
    nn.init.normal_(net.body[3].weight)
    nn.init.normal_(net.body[3].bias)
    net.register_buffer("steps", torch.tensor(seed))
    return net


def factors(weights=None):
    """Factors of full rank of both layers of the body."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, sides in SIDES.items():
        G, A = (
            rows.T @ rows / 40 for rows in (torch.randn(40, d, dtype=torch.float64, generator=generator) for d in sides)
        )
        made[name] = LayerFactors(A=A, G=G, num_inputs=40, num_gradients=40)
    return KroneckerFactors(made, weights or {})


START, TUNED = network(0), network(1)
EDITORS = [
    CurvatureEditor(0.7),
    CurvatureEditor(0.7, soft=True),
    CurvatureEditor(0.7, score="activations"),
    CurvatureEditor(budget=0.01),
    CurvatureEditor(budget=0.01, soft=True),
    SVDEditor(0.7),
    RandomBasisEditor(0.7),
    InterpolationEditor(0.7),
]
IDS = ["kfac", "soft", "activations", "budget", "soft budget", "svd", "random", "interpolation"]


@pytest.mark.parametrize("editor", EDITORS, ids=IDS)
def test_an_edit_of_the_update_is_the_start_and_an_edit_of_the_difference(editor):
    edited, difference = copy.deepcopy(TUNED), copy.deepcopy(TUNED)
    for layer in (0, 2):
        difference.body[layer].weight.data = TUNED.body[layer].weight.data - START.body[layer].weight.data
    report = editor.edit(edited, factors(), reference=START)
    # Of the same matrices an edit of weights does the same; interpolation is no such edit.
    expected = InterpolationEditor(0.7) if isinstance(editor, InterpolationEditor) else editor
    of_difference = expected.based_on({f"{name}.weight": torch.zeros(sides) for name, sides in SIDES.items()})
    of_difference.edit(difference, factors())
    for layer in (0, 2):
        change = edited.body[layer].weight - START.body[layer].weight
        assert torch.allclose(change, difference.body[layer].weight, atol=1e-6)
    assert report.reference == "start"
    assert 0 < report.update_kept < 1
    assert "Edited updates since 'start'" in str(report)


@pytest.mark.parametrize("editor", EDITORS, ids=IDS)
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_other_weights_keep_more_than_the_layers(editor, scale):
    edited = copy.deepcopy(TUNED)
    editor = editor.based_on(START, scale)
    report = editor.edit(edited, factors())
    share = editor.share_of_others(report)
    mean = (scale * report.update_kept) ** 0.5
    assert share == pytest.approx(report.update_kept if isinstance(editor, InterpolationEditor) else mean)
    for name in ("embedding.weight", "body.0.bias", "body.2.bias", "body.3.weight", "body.3.bias"):
        start, tuned = START.get_parameter(name), TUNED.get_parameter(name)
        assert torch.allclose(edited.get_parameter(name), start + share * (tuned - start), atol=1e-6)
    assert edited.head.weight is edited.embedding.weight
    assert edited.steps == 1
    layers = report.layers.values()
    mean = sum(edit.update_kept * edit.total for edit in layers) / sum(edit.total for edit in layers)
    assert report.update_kept == pytest.approx(mean)


def test_interpolation_keeps_one_share_of_everything():
    edited = copy.deepcopy(TUNED)
    report = InterpolationEditor(0.25).edit(edited, factors(), reference=START)
    assert report.update_kept == pytest.approx(0.25)
    for name, parameter in edited.named_parameters():
        start, tuned = START.get_parameter(name), TUNED.get_parameter(name)
        assert torch.allclose(parameter, start + 0.25 * (tuned - start), atol=1e-6)


def test_the_edit_is_undone_behind_a_with_block():
    edited = copy.deepcopy(TUNED)
    with CurvatureEditor(0.7).based_on(START, 0.8).applied(edited, factors()):
        assert not torch.equal(edited.embedding.weight, TUNED.embedding.weight)
    assert all(torch.equal(edited.state_dict()[name], tensor) for name, tensor in TUNED.state_dict().items())


@pytest.mark.parametrize("editor", EDITORS, ids=IDS)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_module_state_dict_and_file_are_edited_alike(editor, prefix, tmp_path):
    """Whatever the reference is: a module, a state dict, or a file whose names have another prefix."""
    edited = copy.deepcopy(TUNED)
    expected_report = editor.based_on(START, 0.8).edit(edited, factors())
    save_file({prefix + name: tensor.clone() for name, tensor in START.state_dict().items()}, tmp_path / "start.st")
    (tmp_path / "start.st").rename(tmp_path / "start.safetensors")
    by_file = editor.based_on(tmp_path / "start.safetensors", 0.8)
    state_dict, report = by_file.edit_state_dict(TUNED.state_dict(), factors())
    torch.save(TUNED.state_dict(), tmp_path / "tuned.pt")
    delta = tmp_path / "delta.safetensors"
    by_state_dict = editor.based_on(START.state_dict(), 0.8)
    file_report = by_state_dict.edit_checkpoint(tmp_path / "tuned.pt", factors(), tmp_path / "edited.pt", delta=delta)
    from_file = torch.load(tmp_path / "edited.pt", weights_only=True)
    for name, tensor in edited.state_dict().items():
        assert torch.equal(state_dict[name], tensor), name
        assert torch.equal(from_file[name], tensor), name
    assert report.others == file_report.others == 5
    assert expected_report.update_kept == report.update_kept == file_report.update_kept
    assert state_dict["head.weight"] is state_dict["embedding.weight"]
    apply_delta(tmp_path / "edited.pt", delta, tmp_path / "back.pt", revert=True)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back[name], tensor) for name, tensor in TUNED.state_dict().items())


def test_a_plan_counts_the_other_weights(tmp_path):
    torch.save(TUNED.state_dict(), tmp_path / "tuned.pt")
    plan = plan_edit(CurvatureEditor(0.7).based_on(START, 0.8), tmp_path / "tuned.pt", factors())
    assert plan.report.others == 5


def test_a_layer_that_fine_tuning_left_alone_stays(tmp_path):
    tuned = copy.deepcopy(TUNED)
    tuned.body[0].weight.data = START.body[0].weight.data.clone()
    report = CurvatureEditor(0.7).edit(tuned, factors(), reference=START)
    assert torch.equal(tuned.body[0].weight, START.body[0].weight)
    assert report.layers["body.0"].update == 0
    assert report.layers["body.0"].predicted_loss == 0


def test_what_is_no_reference_is_refused(tmp_path):
    with pytest.raises(TypeError, match="A reference is a module"):
        CurvatureEditor().based_on(3)
    with pytest.raises(FileNotFoundError):
        CurvatureEditor().based_on(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="is no model that this one started from"):
        CurvatureEditor().edit(copy.deepcopy(TUNED), factors(), reference=nn.Linear(3, 3))
    other = {**START.state_dict(), "body.0.weight": torch.zeros(3, 3)}
    with pytest.raises(ValueError, match=r"In the reference: Layer 'body.0'"):
        CurvatureEditor().edit(copy.deepcopy(TUNED), factors(), reference=other)
    ascent = GradientAscent([1], [1], lambda module, batch: batch)
    with pytest.raises(ValueError, match="takes no reference"):
        ascent.edit(copy.deepcopy(TUNED), factors(), reference=START)
    with pytest.raises(ValueError, match="needs the weights that the model was fine-tuned from"):
        InterpolationEditor(0.5).edit(copy.deepcopy(TUNED), factors())


@pytest.mark.parametrize(
    "editor", [EDITORS[0], EDITORS[4], EDITORS[5], CurvatureEditor(1.0)], ids=["kfac", "soft budget", "svd", "all"]
)
def test_a_scale_shrinks_what_is_kept_and_all_else(editor):
    edited, shrunk = copy.deepcopy(TUNED), copy.deepcopy(TUNED)
    report = editor.based_on(START).edit(edited, factors())
    half = editor.based_on(START, scale=0.5).edit(shrunk, factors())
    assert half.update_kept == pytest.approx(0.5 * report.update_kept)
    for name, parameter in shrunk.named_parameters():
        start = START.get_parameter(name)
        assert torch.allclose(parameter - start, 0.5 * (edited.get_parameter(name) - start), atol=1e-6)
    if editor.reads_factors:
        cost = 0.0
        for name, layer in factors().items():
            change = (shrunk.get_parameter(f"{name}.weight") - TUNED.get_parameter(f"{name}.weight")).detach().double()
            cost += 0.5 * float(torch.trace(change.T @ layer.G @ change @ layer.A))
        assert half.predicted_loss == pytest.approx(cost, rel=1e-5)
    assert editor.based_on(START, scale=0.5).facts(factors(), "source")["reference"] == {"name": "start", "scale": 0.5}


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_scale_is_a_share(scale):
    with pytest.raises(ValueError, match="scale"):
        CurvatureEditor(0.7).based_on(START, scale=scale)


def test_a_wrapped_reference_moves_all_other_weights():
    """Names of a compiled module have a mark of its own in them."""
    wrapped = {f"model._orig_mod.{name}": tensor for name, tensor in START.state_dict().items()}
    edited, expected = copy.deepcopy(TUNED), copy.deepcopy(TUNED)
    CurvatureEditor(0.7).based_on(wrapped, 0.8).edit(edited, factors())
    CurvatureEditor(0.7).based_on(START, 0.8).edit(expected, factors())
    assert all(torch.equal(edited.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_a_dead_direction_keeps_its_share_where_an_edit_only_scales():
    layer = factors()["body.0"]
    A = layer.A.clone()
    A[0], A[:, 0] = 0.0, 0.0
    dead = KroneckerFactors({"body.0": LayerFactors(A=A, G=layer.G, num_inputs=40, num_gradients=40)})
    edited = copy.deepcopy(TUNED)
    CurvatureEditor(1.0, soft=True).based_on(START, 0.5).edit(edited, dead)
    middle = 0.5 * (START.body[0].weight + TUNED.body[0].weight)
    assert torch.allclose(edited.body[0].weight, middle, atol=1e-6)
