"""The strongest edit within a price."""

import math

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.search.price import MOST, Price, spend


def made():
    """A layer whose coefficients have masses of many sizes, and its factors."""
    layer = nn.Sequential(nn.Linear(40, 1, bias=False)).double()
    layer[0].weight.data.fill_(1.0)
    masses = torch.logspace(-8, 0, 40, dtype=torch.float64)
    A = torch.diag(masses)
    one = torch.ones(1, 1, dtype=torch.float64)
    return layer, KroneckerFactors({"0": LayerFactors(A=A, G=one, num_inputs=99, num_gradients=99)})


def removed(layer):
    """Share of the weight that is gone."""
    return float(1 - layer[0].weight.detach().mean())


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("start", [1e-6, 1e-3, 0.4])
def test_the_strongest_edit_within_the_price_is_found_from_any_start(soft, start):
    layer, factors = made()
    before = layer[0].weight.detach().clone()
    calls = []

    def measure():
        calls.append(removed(layer))
        return {"loss": removed(layer)}

    purchase = spend(
        CurvatureEditor(soft=soft, budget=1.0), layer, factors, measure, Price({"loss": (0.5, True)}, start)
    )
    assert torch.equal(layer[0].weight, before)
    assert len(calls) == len(purchase.points) <= MOST + 1
    assert 0.35 < purchase.after["loss"] <= 0.5
    assert purchase.before == {"loss": 0.0}
    assert purchase.predicted == pytest.approx(purchase.budget, rel=0.4)
    with CurvatureEditor(budget=purchase.budget, soft=soft).applied(layer, factors):
        assert removed(layer) == pytest.approx(purchase.after["loss"])
    assert "The strongest edit within the price" in str(purchase)


def test_the_price_counts_from_the_lowest_point():
    """A cost that falls at first, to -1 where half is gone, and rises then: what was gained is not spent."""
    layer, factors = made()
    purchase = spend(
        CurvatureEditor(budget=1.0),
        layer,
        factors,
        lambda: {"loss": abs(removed(layer) - 0.5) / 0.5 - 1},
        Price({"loss": (0.3, True)}, 1e-2),
    )
    assert purchase.after["loss"] < -0.5
    assert 0.4 < removed_at(purchase.budget) < 0.66


def removed_at(budget):
    layer, factors = made()
    CurvatureEditor(budget=budget).edit(layer, factors)
    return removed(layer)


def test_no_cost_may_exceed_its_own_price():
    layer, factors = made()
    purchase = spend(
        CurvatureEditor(budget=1.0),
        layer,
        factors,
        lambda: {"a": removed(layer), "b": 10 * removed(layer), "c": -removed(layer)},
        Price({"a": (0.9, True), "b": (2.0, False), "c": (0.1, False)}, 1e-3),
    )
    assert 1.0 < purchase.after["b"] <= 2.0


@pytest.mark.parametrize("knee", [0.3, 0.6])
def test_a_loss_that_falls_all_the_way_does_not_end_the_search_early(knee):
    """What sets the price is another cost, which rises at once."""
    layer, factors = made()

    def costs():
        gone = removed(layer)
        return {"loss": 1.0 - gone, "error": 0.0 if gone < knee else 1.0}

    price = Price({"loss": (0.05, True), "error": (0.5, False)}, 1e-3)
    purchase = spend(CurvatureEditor(budget=1.0), layer, factors, costs, price)
    assert knee - 0.05 < removed_at(purchase.budget) < knee


def test_no_edit_is_within_the_price():
    layer, factors = made()
    step = lambda: {"loss": 1.0 if removed(layer) > 0 else 0.0}  # noqa: E731
    purchase = spend(CurvatureEditor(budget=1.0), layer, factors, step, Price({"loss": (0.5, True)}, 1e-3))
    assert purchase.budget == 0.0
    assert purchase.before == purchase.after
    assert "No edit stays within the price" in str(purchase)


def test_a_cost_that_is_no_number_is_beyond_the_price():
    layer, factors = made()
    purchase = spend(
        CurvatureEditor(budget=1.0),
        layer,
        factors,
        lambda: {"loss": math.nan if removed(layer) > 0.5 else 0.0},
        Price({"loss": (0.5, True)}, 1e-3),
    )
    assert 0.3 < removed_at(purchase.budget) <= 0.5


def test_the_search_ends_where_everything_is_gone():
    layer, factors = made()
    purchase = spend(
        CurvatureEditor(budget=1.0), layer, factors, lambda: {"loss": 1.0}, Price({"loss": (0.5, True)}, 0.2)
    )
    assert removed_at(purchase.budget) == 1.0
    assert len(purchase.points) <= 4
