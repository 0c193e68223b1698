"""The edit that closes most of the gap between training and validation, at next to no loss of validation.

A model that recites is better on its training data than on others. An edit that makes it worse on the training data,
and no worse on validation data, takes away what was recited. No label has to be known to be wrong. Which layers hold
it, and how strong the edit must be, differs from model to model: a few candidates are tried, each at a grid of budgets,
since a cost can rise and fall again on the way. How far the error on validation data may rise is counted
from the best edit that was tried: counted from the unedited model, what milder edits gain would be spent.

Source: Breiman et al. 1984, "Classification and Regression Trees" (the one-standard-error rule).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tabulate import tabulate
from torch import nn

from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.price import Costs

FIRST, STEP, MOST = 0.0025, 2.0, 12
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


class Tried:
    """A candidate, and what was measured under its edits.

    Args:
        candidate: The candidate.

    Attributes:
        points: Costs by budget.
        predicted: Predicted losses by budget.
        all_of_it: Predicted loss of an edit that leaves nothing; infinite until one did.
    """

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.points: dict[float, Costs] = {}
        self.predicted: dict[float, float] = {}
        self.all_of_it = math.inf

    def measure(self, budget: float, module: nn.Module, measure: Callable[[], Costs]) -> bool:
        """Measure an edit; tell whether it left something that a stronger one could remove."""
        with self.candidate.editor.within(budget).applied(module, self.candidate.factors) as report:
            self.points[budget] = measure()
        self.predicted[budget] = report.predicted_loss or 0.0
        if report.keeps_nothing:
            self.all_of_it = self.predicted[budget]
        return not report.keeps_nothing


class _Rule:
    """Which edit is taken: one that closes a gap, while no cost rises more than it may."""

    def __init__(self, before: Costs, gap: Callable[[Costs], float], allowed: Mapping[str, tuple[float, bool]]) -> None:
        self._base, self._gap, self._before = dict(before), gap, before
        self._allowed = {name: rise for name, (rise, _) in allowed.items()}
        self._from_lowest = [name for name, (_, from_lowest) in allowed.items() if from_lowest]

    def note(self, tried: Tried) -> None:
        """Take lowest points of costs from what was measured."""
        for name in self._from_lowest:
            costs = [costs[name] for costs in tried.points.values()]
            self._base[name] = min([self._base[name], *(cost for cost in costs if not math.isnan(cost))])

    def excess(self, costs: Costs) -> float:
        """Return how far a cost is beyond what it may be; at most 0 if none is."""
        rises = [costs[name] - self._base[name] - rise for name, rise in self._allowed.items()]
        return max(rise if math.isfinite(rise) else math.inf for rise in rises)

    def best(self, tried: Tried) -> float | None:
        """Return the budget of a candidate that closes most of the gap; None if none does."""
        points = tried.points.items()
        within = [budget for budget, costs in points if self.excess(costs) <= 0 and math.isfinite(self._gap(costs))]
        best = min(within, key=lambda budget: (self._gap(tried.points[budget]), budget), default=None)
        return best if best is not None and self._gap(tried.points[best]) < self._gap(self._before) else None


def choose(
    candidates: Sequence[Candidate],
    module: nn.Module,
    measure: Callable[[], Costs],
    before: Costs,
    gap: Callable[[Costs], float],
    allowed: Mapping[str, tuple[float, bool]],
) -> tuple[list[Tried], tuple[Tried, float] | None]:
    """Find the edit that closes most of a gap, while no cost rises more than it may.

    Args:
        candidates: What to try.
        module: The network; edited only while it is measured.
        measure: Returns the costs of the module as it is.
        before: Costs of the unedited module.
        gap: Returns how much lower the error is on training data than on validation data, given the costs.
        allowed: How far each cost on validation data may rise, by name, and whether above the lowest that was measured,
            or above that of the unedited module.

    Returns:
        All that was measured, and of it a candidate and its budget; None if there is no such edit.
    """
    tried, rule = [Tried(candidate) for candidate in candidates], _Rule(before, gap, allowed)
    for each in tried:
        for step in range(MOST):
            budget = FIRST * STEP**step
            if not each.measure(budget, module, measure) or not rule.excess(each.points[budget]) < FAR:
                break
        rule.note(each)
    for each in tried:
        mildest = min(FIRST, each.all_of_it) or FIRST
        for step in range(1, 1 + MILDER):
            if rule.best(each) is not None:
                break
            each.measure(mildest / STEP**step, module, measure)
        if (coarse := rule.best(each)) is not None:
            for factor in FINER:
                each.measure(coarse * factor, module, measure)
                if rule.best(each) != coarse:
                    break
        rule.note(each)
    best = [(each, chosen) for each in tried if (chosen := rule.best(each)) is not None]
    return tried, min(best, key=lambda found: gap(found[0].points[found[1]]), default=None)


def curves(tried: Mapping[str, Mapping[float, Costs]]) -> list[tuple[str, dict[str, float]]]:
    """Return all that was measured as rows: the name of the candidate, and its budget beside the costs."""
    return [(name, {"budget": budget, **costs}) for name, points in tried.items() for budget, costs in points.items()]


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
