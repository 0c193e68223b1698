"""Factors that rest on too few positions: told, and not used unless that is insisted on."""

import dataclasses
import functools

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.baselines import InterpolationEditor, RandomBasisEditor, SVDEditor
from lightning_curvature.editing.bulk import BulkStepEditor
from lightning_curvature.factors.decomposition import TooFewPositionsError
from tests import reference
from tests.support.faults import ENOUGH, FEW, failing_eigh, few, moment

pytestmark = [
    pytest.mark.filterwarnings("ignore:The factors of layer .* rest on"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


@pytest.mark.parametrize("name", FEW)
def test_factors_say_that_they_rest_on_too_few_positions(name):
    arguments, message = FEW[name]
    assert message in few(*arguments).too_few_positions()


@pytest.mark.parametrize("name", ENOUGH)
def test_factors_that_rest_on_enough_positions_say_nothing(name, monkeypatch):
    A, num_inputs, G, num_gradients = ENOUGH[name]
    calls = failing_eigh(monkeypatch, 0)
    assert few(A, num_inputs, G, num_gradients).too_few_positions() is None
    lacking = [count < int((factor.diagonal() != 0).sum()) for factor, count in ((A, num_inputs), (G, num_gradients))]
    assert len(calls) == sum(lacking)  # nothing is decomposed that need not be


def two_layers(**options):
    """Layers of which the first one's factors rest on too few positions."""
    extra = {
        "margins": torch.ones(4, 8),
        "eigenvalues": torch.arange(1.0, 33.0).view(4, 8),
        "A_coupled": moment(20, 8),
        "G_coupled": moment(20, 4),
    } | options
    layers = [few(*FEW["rank of A"][0]), few(moment(20, 8), 20, moment(20, 4), 20)]
    return KroneckerFactors({str(i): dataclasses.replace(layer, **extra) for i, layer in enumerate(layers)})


def linears():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])


SCORES = ("kfac", "ekfac", "coupled", "saliency", "activations")
CURVATURE_EDITORS = {
    **{
        f"{score}, soft={soft}": functools.partial(CurvatureEditor, 0.7, score=score, soft=soft)
        for score in SCORES
        for soft in (False, True)
    },
    "bulk": functools.partial(BulkStepEditor, 0.3),
    "bulk and edit": functools.partial(BulkStepEditor, 0.3, 0.7),
}


def edited(way, editor, net, factors):
    """Return the report of an edit, and the weights that it makes of the two layers."""
    if way == "state dict":
        state, report = editor.edit_state_dict(net.state_dict(), factors)
        return report, [state["0.weight"], state["1.weight"]]
    if way == "applied":
        with editor.applied(net, factors) as report:
            return report, [layer.weight.clone() for layer in net]
    editor = editor.at(editor.energy) if way == "at" else editor
    return editor.edit(net, factors), [layer.weight for layer in net]


@pytest.mark.parametrize("name", CURVATURE_EDITORS)
@pytest.mark.parametrize("way", ["edit", "applied", "state dict", "at"])
def test_a_layer_on_too_few_positions_is_left_as_it_is(name, way):
    editor, net, factors = CURVATURE_EDITORS[name](), linears(), two_layers()
    before = [layer.weight.clone() for layer in net]
    with pytest.warns(UserWarning, match="Not edited: Layer '0': Factor A rests on 5 positions"):
        report, after = edited(way, editor, net, factors)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert list(report.layers) == ["1"]
    assert "Layer '0': Factor A rests on 5 positions, too few" in report.skipped["0"]
    assert f"Not edited: {report.skipped['0']}" in str(report)
    with pytest.raises(ValueError, match="No layer can be edited: Layer '0': Factor A rests on 5 positions"):
        editor.edit(net, KroneckerFactors({"0": factors["0"]}))
    insist = r"Layer '0': Factor A .* insist \(CurvatureEditor\(min_positions=0\), --min-positions 0\)"
    with pytest.raises(TooFewPositionsError, match=insist):
        editor.edit_weight("0", before[0], factors["0"], 0.7, False)


@pytest.mark.parametrize("name", CURVATURE_EDITORS)
def test_an_edit_on_too_few_positions_can_be_insisted_on(name):
    net, factors = linears(), two_layers()
    before = net[0].weight.detach().double()
    report = CURVATURE_EDITORS[name](min_positions=0).edit(net, factors)
    assert list(report.layers) == ["0", "1"]
    assert not torch.equal(before, net[0].weight.double())
    assert "rest on fewer positions than the larger side of the weight: '0' (5 of 8). Their" in str(report)
    assert "collect more positions" in str(report)
    if name == "kfac, soft=False":
        expected = reference.edit(before, factors["0"].A, factors["0"].G, 0.7)
        torch.testing.assert_close(net[0].weight.double(), expected, rtol=1e-5, atol=1e-6)
    strict = CURVATURE_EDITORS[name](min_positions=6)
    with pytest.warns(
        UserWarning, match="Layer '0': its factors rest on 5 positions, and min_positions=6 asks for more"
    ):
        assert list(strict.edit(linears(), factors).layers) == ["1"]
    with pytest.raises(ValueError, match=r"No layer can be edited: .* min_positions=21"):
        CURVATURE_EDITORS[name](min_positions=21).edit(linears(), factors)


@pytest.mark.parametrize(
    "editor",
    [SVDEditor(0.7), RandomBasisEditor(0.7), CurvatureEditor({"0": 1.0, "1": 0.7})],
    ids=["SVD", "random basis", "full energy"],
)
def test_what_reads_no_factors_or_changes_nothing_needs_no_positions(editor):
    report = editor.edit(linears(), two_layers())
    assert list(report.layers) == ["0", "1"]
    assert ("fewer positions" in str(report)) == isinstance(editor, CurvatureEditor)


def test_an_edit_with_dead_inputs_is_done_and_the_table_says_that_they_are_many():
    A, n, G, _ = ENOUGH["dead inputs"]
    report = CurvatureEditor(0.7).edit_layers({"0": torch.ones(54, 38)}, KroneckerFactors({"0": few(A, n, G, n)}))[1]
    assert "'0' (9 of 54)" in str(report)


def test_min_positions_is_checked():
    for bad in (1.5, True, "3"):
        with pytest.raises(TypeError, match="min_positions must be an integer or None, found"):
            CurvatureEditor(min_positions=bad)
    with pytest.raises(ValueError, match="min_positions must not be negative, found -1"):
        CurvatureEditor(min_positions=-1)


def written(editor, net, folder):
    """Return the weights that the edit of a file makes of the two layers."""
    torch.save(net.state_dict(), folder / "tuned.pt")
    editor.edit_checkpoint(folder / "tuned.pt", two_layers(), folder / "edited.pt")
    state = torch.load(folder / "edited.pt")
    return [state["0.weight"], state["1.weight"]]


@pytest.mark.filterwarnings("ignore:Not edited. Layer '0'")
@pytest.mark.parametrize("way", ["edit", "applied", "state dict", "file"])
def test_such_a_layer_is_scaled_with_all_updates(way, tmp_path):
    """It is one of the other weights, which go back by less than the edited layers."""
    net, start = linears(), linears()
    for parameter in start.parameters():
        parameter.data = parameter.data - 0.1
    before, editor = net[0].weight.clone(), InterpolationEditor(1.0).based_on(start, 0.5)
    editor.check_positions = CurvatureEditor().check_positions
    after = written(editor, net, tmp_path) if way == "file" else edited(way, editor, net, two_layers())[1]
    torch.testing.assert_close(after[0], before - 0.05)
