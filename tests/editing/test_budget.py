"""One strength for all layers, found for a budget of predicted loss."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.editing.budget import kept_shares, loss_curve, penalty_of
from lightning_curvature.editing.scores import SCORES
from tests.support import processes
from tests.support.processes import here

SIDES = {"0": (9, 7), "2": (5, 9)}
SCALES = {"0": 1.0, "2": 30.0}


def made():
    """A network of two layers, and factors of full rank, those of the second layer much larger."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 5)).double()
    factors = {}
    for name, sides in SIDES.items():
        G, A = (rows.T @ rows * SCALES[name] / 60 for rows in (torch.randn(60, side).double() for side in sides))
        extra = {"A_coupled": A, "G_coupled": G, "eigenvalues": torch.rand(sides, dtype=torch.float64) * SCALES[name]}
        factors[name] = LayerFactors(A=A, G=G, num_inputs=60, num_gradients=60, **extra)
    return net, KroneckerFactors(factors)


@pytest.mark.parametrize("soft", [False, True])
def test_a_curve_prices_every_penalty(soft):
    generator = torch.Generator().manual_seed(0)
    scores, losses = torch.rand(2, 40, 30, dtype=torch.float64, generator=generator)
    scores = scores.square()
    curve = loss_curve(scores, losses)
    for penalty in (1e-4, 0.01, 0.3, 2.0):
        exact = (losses * (1 - kept_shares(scores, penalty, soft)).square()).sum()
        assert curve.at(penalty, soft) == pytest.approx(float(exact), rel=0.03)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("soft", [False, True])
def test_the_report_meets_the_budget(score, soft):
    net, factors = made()
    everything = CurvatureEditor(budget=1e9, score=score, soft=soft).edited_weights(net, factors)[1]
    assert everything.keeps_nothing
    for share in (0.05, 0.5):
        budget = share * everything.predicted_loss
        report = CurvatureEditor(budget=budget, score=score, soft=soft).edited_weights(net, factors)[1]
        assert report.predicted_loss <= 1.03 * budget
        if soft:
            assert report.predicted_loss == pytest.approx(budget, rel=0.03)
        assert report.layers["0"].energy is None
        assert not report.keeps_nothing


def test_all_layers_have_one_threshold():
    net, factors = made()
    weights, _ = CurvatureEditor(budget=1.0).edited_weights(net, factors)
    kept, dropped = [], []
    for name, weight in weights.items():
        basis = factors[name].basis
        mass = torch.outer(basis.lam, basis.mu)
        is_kept = (basis.U_G.T @ weight @ basis.U_A).abs() > 1e-9
        kept.append(mass[is_kept])
        dropped.append(mass[~is_kept])
    assert torch.cat(kept).min() > torch.cat(dropped).max()


def test_the_soft_edit_is_the_minimum_of_the_second_order_loss_and_a_penalty():
    net, factors = made()
    editor = CurvatureEditor(budget=1.0, soft=True)
    weights, _ = editor.edited_weights(net, factors)
    parts = {name: lambda layer=int(name), name=name: (net[layer].weight.detach(), factors[name]) for name in SIDES}
    penalty = editor.prepared(parts).penalty
    for name, weight in weights.items():
        old = net[int(name)].weight.detach()
        curvature = torch.kron(factors[name].G, factors[name].A)
        solved = torch.linalg.solve(curvature + penalty * torch.eye(len(curvature)), curvature @ old.flatten())
        assert torch.allclose(weight.flatten(), solved, atol=1e-9)


def test_a_search_over_budgets_gives_what_each_gives_alone():
    net, factors = made()
    trial = CurvatureEditor(budget=1.0, soft=True).within(1.0)
    for budget in (0.1, 3.0, 0.1):
        trial = trial.within(budget)
        new = trial.edited_weights(net, factors)[0]
        expected = CurvatureEditor(budget=budget, soft=True).edited_weights(net, factors)[0]
        assert all(torch.equal(new[name], weight) for name, weight in expected.items())


def test_a_budget_takes_the_place_of_an_energy_and_back():
    net, factors = made()
    editor = CurvatureEditor(0.7)
    editor.use_budget(0.5)
    new = editor.edited_weights(net, factors)[0]
    expected = CurvatureEditor(budget=0.5).edited_weights(net, factors)[0]
    assert all(torch.equal(new[name], weight) for name, weight in expected.items())
    back = editor.at(0.7).edited_weights(net, factors)[0]
    expected = CurvatureEditor(0.7).edited_weights(net, factors)[0]
    assert all(torch.allclose(back[name], weight) for name, weight in expected.items())


def test_layers_with_too_few_positions_are_passed_over():
    net, factors = made()
    G = torch.zeros(5, 5, dtype=torch.float64)
    G[0, 0] = 1.0
    few = LayerFactors(A=factors["2"].A, G=G + 1e-30 * torch.eye(5), num_inputs=60, num_gradients=1)
    with pytest.warns(UserWarning, match="Not edited: Layer '2'"):
        new, report = CurvatureEditor(budget=0.5).edited_weights(net, KroneckerFactors({"0": factors["0"], "2": few}))
    alone, _ = CurvatureEditor(budget=0.5).edited_weights(net, KroneckerFactors({"0": factors["0"]}))
    assert torch.equal(new["0"], alone["0"])
    assert set(report.layers) == {"0"}
    with pytest.raises(ValueError, match="No layer can be edited"):
        CurvatureEditor(budget=0.5).edited_weights(net, KroneckerFactors({"2": few}))


def test_scores_of_zero_are_dropped_by_any_penalty():
    assert penalty_of([loss_curve(torch.zeros(2, 2), torch.ones(2, 2))], 1.0, True) == 0.0
    assert penalty_of([loss_curve(torch.zeros(2, 2), torch.zeros(2, 2))], 1.0, True) == float("inf")
    curve = loss_curve(torch.tensor([0.0, 2.0]), torch.tensor([0.25, 1.0]))
    assert 1.9 < penalty_of([curve], 0.5, False) < 2.1


@pytest.mark.parametrize("budget", [0.0, -1.0, float("inf"), float("nan")])
def test_a_budget_is_positive(budget):
    with pytest.raises(ValueError, match="budget must be positive"):
        CurvatureEditor(budget=budget)


def test_wrong_budgets_are_refused():
    with pytest.raises(TypeError, match="number of nats"):
        CurvatureEditor(budget="a lot")
    with pytest.raises(ValueError, match="not both"):
        CurvatureEditor(0.85, budget=0.1)


def test_the_file_says_the_budget(tmp_path):
    net, factors = made()
    facts = CurvatureEditor(budget=0.5).facts(factors, "source")
    assert facts["budget"] == 0.5
    assert "energy" not in facts["layers"]["0"]
    before = copy.deepcopy(net.state_dict())
    torch.save(before, tmp_path / "net.pt")
    report = CurvatureEditor(budget=0.5).edit_checkpoint(tmp_path / "net.pt", factors, tmp_path / "edited.pt")
    state_dict, same = CurvatureEditor(budget=0.5).edit_state_dict(before, factors)
    assert report.layers.keys() == same.layers.keys()
    written = torch.load(tmp_path / "edited.pt", weights_only=True)
    assert all(torch.allclose(written[name], tensor) for name, tensor in state_dict.items())


def test_a_budget_counts_the_losses_behind_positions():
    """Where four positions serve one loss, a change costs sixteen times as much, in the report and in the budget."""
    net, factors = made()
    several = {name: dataclasses.replace(layer, num_losses=15) for name, layer in factors.items()}
    report = CurvatureEditor(budget=0.5, soft=True).edited_weights(net, KroneckerFactors(several))[1]
    assert report.predicted_loss == pytest.approx(0.5, rel=0.03)
    new = CurvatureEditor(budget=0.5, soft=True).edited_weights(net, KroneckerFactors(several))[0]
    expected = CurvatureEditor(budget=0.5 / 16, soft=True).edited_weights(net, factors)[0]
    assert all(torch.allclose(new[name], weight, rtol=0.02, atol=1e-3) for name, weight in expected.items())


def edit_with_a_wrong_reference():
    """Edit on one of two processes; the layer of one of them has another shape in the reference."""
    net, factors = made()
    editor = CurvatureEditor(budget=0.5)
    editor.ranks = here()
    reference = {**net.state_dict(), "2.weight": torch.zeros(3, 3)}
    try:
        editor.edit(net, factors, reference=reference)
    except ValueError as error:
        return str(error)
    return None


def test_a_layer_that_cannot_be_priced_is_an_error_on_all_processes():
    reasons = processes.run(2, edit_with_a_wrong_reference)
    assert all(reason is not None and "In the reference: Layer '2'" in reason for reason in reasons)


@pytest.mark.parametrize("soft", [False, True])
def test_a_small_budget_of_several_layers_is_spent(soft):
    """Each layer has coefficients of no score, which are free, and dear ones that no budget pays for."""
    curves = [
        loss_curve(torch.tensor([[0.0, first, 8.0]]).double(), torch.tensor([[0.0, cost, 5.0]]).double())
        for first, cost in ((4.0, 3.0), (0.5, 1e-6), (1.0, 2e-6))
    ]
    penalty = penalty_of(curves, 1e-5, soft)
    assert 1.0 < penalty < 4.1 if not soft else penalty > 0.0
    spent = sum(curve.at(penalty, soft) for curve in curves)
    assert spent == pytest.approx(1e-5 if soft else 3e-6)
