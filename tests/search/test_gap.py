"""The edit that closes most of the gap between training and validation."""

import math

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.search.gap import FIRST, MILDER, MOST, Candidate, choose, table

SIZE = 16


def made(scale=1.0):
    """Two layers whose directions cost ever more, and a candidate for each."""
    module = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Linear(SIZE, SIZE, bias=False))
    candidates = []
    for index, layer in enumerate(module):
        nn.init.eye_(layer.weight)
        moment = torch.diag(scale * 1.4 ** torch.arange(float(SIZE)) / 20)
        factors = {str(index): LayerFactors(A=moment, G=moment, num_inputs=99, num_gradients=99)}
        candidates.append(Candidate(f"layer {index}", CurvatureEditor(budget=1.0), KroneckerFactors(factors)))
    return module, candidates


def removed(layer):
    return 1.0 - float(layer.weight.detach().diagonal().sum()) / SIZE


def measured(module, error):
    """The training error is what is removed of both; the validation error is what a function says of it."""
    return lambda: {
        "training error": removed(module[0]) + 1.1 * removed(module[1]),
        "validation error": error(removed(module[0]), removed(module[1])),
    }


def gap(costs):
    return costs["validation error"] - costs["training error"]


def chosen(error, scale=1.0):
    module, candidates = made(scale)
    measure = measured(module, error)
    tried, best = choose(candidates, module, measure, measure(), gap, {"validation error": (0.0, False)})
    assert all(removed(layer) == 0 for layer in module)
    return tried, best


def removed_by(best):
    of_candidate, budget = best
    return of_candidate.points[budget]["training error"]


def test_the_strongest_edit_without_loss_is_taken():
    """Of the first layer more can go than of the second one."""
    tried, best = chosen(lambda a, b: 0.0 if a < 0.7 and b < 0.3 else 0.2)
    assert best[0] is tried[0]
    assert 0.5 < removed_by(best) < 0.7
    assert all(len(of_candidate.points) <= MOST + MILDER + 2 for of_candidate in tried)


def test_a_cost_may_rise_and_fall_again_on_the_way():
    _, best = chosen(lambda a, b: 0.05 if 0.2 < a < 0.5 or b or a > 0.8 else 0.0)
    assert 0.5 <= removed_by(best) <= 0.8


def test_no_edit_is_taken_where_each_costs_something():
    tried, best = chosen(lambda a, b: 0.0 if a == b == 0 else 0.01)
    assert best is None
    assert min(tried[0].points) == FIRST / 2**MILDER


@pytest.mark.parametrize("cost", [float("nan"), float("inf")])
def test_edits_whose_costs_are_no_numbers_are_not_taken(cost):
    """Neither on validation data nor on training data."""
    _, best = chosen(lambda a, b: cost if a > 0.2 else 0.0 if not b else 1.0)
    assert 0 < removed_by(best) <= 0.2
    module, candidates = made()
    plain = measured(module, lambda a, b: 0.0 if not b else 1.0)

    def measure():
        costs = plain()
        return costs | ({"training error": cost} if costs["training error"] > 0.2 else {})

    _, best = choose(candidates, module, measure, plain(), gap, {"validation error": (0.0, False)})
    assert 0 < removed_by(best) <= 0.2


def test_the_grid_becomes_milder_where_it_begins_with_too_much():
    """Curvature of a saturated model is next to nothing: the first budget removes all."""
    _, best = chosen(lambda a, b: 0.0 if a < 0.95 and not b else 1.0, scale=0.003)
    assert 0 < removed_by(best) < 0.95
    assert best[1] < FIRST
    tried, _ = chosen(lambda a, b: 1.0 if a or b else 0.0, scale=1e-4)
    assert len(tried[0].points) == 1 + MILDER
    assert sorted(tried[0].points)[-2] < tried[0].all_of_it / 1.9  # no budget that removes all again


def test_a_candidate_is_not_driven_far_beyond_what_is_allowed():
    tried, _ = chosen(lambda a, b: a + b)
    worst = [max(costs["validation error"] for costs in of_candidate.points.values()) for of_candidate in tried]
    assert max(worst) < 0.5


def test_a_cost_that_is_no_number_is_not_allowed():
    _, best = chosen(lambda a, b: math.nan if a > 0.4 or b else 0.0)
    assert 0.2 < removed_by(best) <= 0.4


def test_of_two_edits_the_one_that_is_better_on_validation_is_taken():
    """What is taken from training data is worth as much as what validation data gain."""
    _, best = chosen(lambda a, b: -3.0 * b if b < 0.3 else 0.0)
    assert best[0].candidate.name == "layer 1"


def test_what_milder_edits_gain_is_not_spent():
    """Counted from the lowest point, also that of another candidate."""

    def error(a, b):
        return (0.0 if a < 0.3 else 0.15) if a else 0.2 if not b else 0.12

    module, candidates = made()
    measure = measured(module, error)
    for from_lowest, candidate in ((True, "layer 0"), (False, "layer 1")):
        allowed = {"validation error": (0.05, from_lowest)}
        _, (of_candidate, budget) = choose(candidates, module, measure, measure(), gap, allowed)
        assert of_candidate.candidate.name == candidate
        assert (of_candidate.points[budget]["training error"] < 0.3) == from_lowest


def test_the_table_shows_accuracies():
    module, candidates = made()
    measure = measured(module, lambda a, b: a + b)
    tried, _ = choose(candidates, module, measure, measure(), gap, {"validation error": (0.0, False)})
    lines = table(tried, measure()).splitlines()
    assert "training accuracy" in lines[0]
    assert lines[2].split() == ["none", "0", "1", "1"]
    assert len(lines) == 3 + sum(len(of_candidate.points) for of_candidate in tried)


def test_a_cost_may_rise_as_far_as_it_is_said():
    module, candidates = made()
    measure = measured(module, lambda a, b: a + b)
    for rise in (0.2, 0.5):
        _, best = choose(candidates, module, measure, measure(), gap, {"validation error": (rise, False)})
        of_candidate, budget = best
        assert 0.5 * rise < of_candidate.points[budget]["validation error"] <= rise
