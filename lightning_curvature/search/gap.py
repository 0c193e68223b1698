"""The edit that closes most of the gap between training and validation, at next to no loss of validation.

A classifier that recites labels is better on its training data than on others. An edit that makes it worse on the
training data, and no worse on validation data, takes away what was recited. No label has to be known to be wrong. Which
layers hold it, and how strong the edit must be, differs from model to model: a few candidates are tried, each at a grid
of budgets, since a cost can rise and fall again on the way.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tabulate import tabulate
from torch import nn

from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.price import Costs

FIRST, STEP, MOST = 0.0025, 2.0, 9
"""The first budget of the grid, in nats; the factor from one to the next; how many there are at most."""
MILDER = 4
"""How many budgets below the first one are tried, where that one is too much."""
FAR = 0.1
"""A candidate is not made stronger where one of the others is more than this beyond what it may."""
FINER = (STEP**0.5, STEP**0.25)
"""Factors by which the best budget of a candidate is made larger in the end, each if the one before it was too much."""


class Candidate(NamedTuple):
    """An edit of some strength.

    Args:
        name: What to call it.
        editor: Its budget does not matter.
        factors: Factors of the layers that it edits.
    """

    name: str
    editor: CurvatureEditor
    factors: KroneckerFactors


class Tried(NamedTuple):
    """What was measured under the edits of a candidate.

    Args:
        candidate: The candidate.
        points: Costs by budget.
        predicted: Predicted losses by budget.
    """

    candidate: Candidate
    points: dict[float, Costs]
    predicted: dict[float, float]


def choose(
    candidates: Sequence[Candidate],
    module: nn.Module,
    measure: Callable[[], Costs],
    before: Costs,
    gap: Callable[[Costs], float],
    allowed: Mapping[str, float],
) -> tuple[list[Tried], tuple[Tried, float] | None]:
    """Find the edit that closes most of a gap, while no cost rises more than it may.

    Args:
        candidates: What to try.
        module: The network; edited only while it is measured.
        measure: Returns the costs of the module as it is.
        before: Costs of the unedited module.
        gap: Returns how much lower the error is on training data than on validation data, given the costs.
        allowed: How far each cost on validation data may rise at most, by name.

    Returns:
        All that was measured, and of it a candidate and its budget; None if there is no such edit.
    """
    tried = [_try(candidate, module, measure, before, gap, allowed) for candidate in candidates]
    best: tuple[Tried, float] | None = None
    smallest = gap(before)
    for of_candidate in tried:
        budget = _best(of_candidate.points, before, gap, allowed)
        if budget is not None and gap(of_candidate.points[budget]) < smallest:
            best, smallest = (of_candidate, budget), gap(of_candidate.points[budget])
    return tried, best


def _try(
    candidate: Candidate,
    module: nn.Module,
    measure: Callable[[], Costs],
    before: Costs,
    gap: Callable[[Costs], float],
    allowed: Mapping[str, float],
) -> Tried:
    tried = Tried(candidate, {}, {})

    def at(budget: float) -> bool:
        """Measure an edit; tell whether a stronger one may do more."""
        editor = candidate.editor.within(budget)
        with editor.applied(module, candidate.factors) as report:
            tried.points[budget] = measure()
        tried.predicted[budget] = report.predicted_loss or 0.0
        rises = [tried.points[budget][name] - before[name] - rise for name, rise in allowed.items()]
        return not report.keeps_nothing and max(rises) < FAR

    for step in range(MOST):
        if not at(FIRST * STEP**step):
            break
    for step in range(1, 1 + MILDER):
        if _best(tried.points, before, gap, allowed) is not None:
            break
        at(FIRST / STEP**step)
    coarse = _best(tried.points, before, gap, allowed)
    for factor in FINER if coarse is not None else ():
        at(coarse * factor)
        if _best(tried.points, before, gap, allowed) != coarse:
            break
    return tried


def _best(
    points: Mapping[float, Costs], before: Costs, gap: Callable[[Costs], float], allowed: Mapping[str, float]
) -> float | None:
    """Return the budget that closes most of the gap, among those under which no cost rises more than it may."""
    within = [budget for budget, costs in points.items() if all(costs[n] <= before[n] + allowed[n] for n in allowed)]
    best = min(within, key=lambda budget: (gap(points[budget]), budget), default=None)
    return best if best is not None and gap(points[best]) < gap(before) else None


def table(tried: Sequence[Tried], before: Costs) -> str:
    """Return all that was measured as a table, errors as accuracies."""
    names = list(before)
    titles = [name.replace("error", "accuracy") for name in names]

    def cells(costs: Costs) -> list[float]:
        return [1 - costs[name] if name.endswith("error") else costs[name] for name in names]

    rows = [["none", 0.0, *cells(before)]]
    for of_candidate in tried:
        for budget in sorted(of_candidate.points):
            costs = cells(of_candidate.points[budget])
            rows.append([of_candidate.candidate.name, of_candidate.predicted[budget], *costs])
    return tabulate(rows, ["edit", "predicted cost", *titles], floatfmt=".3g")
