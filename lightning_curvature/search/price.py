"""The strongest edit that a price allows, found by few measurements.

An edit has one strength, the budget of predicted loss. The cost of stronger and stronger edits falls at first, where
over-confidence or a fine-tune's over-fitting goes, and then rises. The price is how far it may rise above the unedited
model's, or above its lowest point on that path, so that what an edit gains first is not spent.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.report import RUINOUS
from lightning_curvature.factors.kronecker import KroneckerFactors

STEP = 4.0
"""Factor between two budgets until one is within the price, and one is not."""
REFINEMENTS = 2
"""Halvings of that step, on a logarithmic scale."""
MOST = 9
"""Largest number of edits that are measured."""

Costs = Mapping[str, float]


@dataclass(frozen=True)
class Price:
    """What an edit may cost.

    Args:
        allowed: By name of a cost, how far it may rise, and whether above its lowest point on the path, or above that
            of the unedited model. Nothing may exceed this.
        start: Predicted loss at which to start, in nats.
        unedited: Costs of the unedited model, if the path begins elsewhere.
    """

    allowed: Mapping[str, tuple[float, bool]]
    start: float
    unedited: Costs | None = None

    def excess(self, budget: float, points: Mapping[float, Costs]) -> float:
        """Return the largest rise of a cost, as a multiple of what is allowed; infinite where one is no number.

        Args:
            budget: Budget of an edit that was measured.
            points: Costs of all edits that were measured, by budget; 0 is where the path begins.
        """
        rises = [0.0]
        for name, (allowed, from_lowest) in self.allowed.items():
            lowest = lowest_point(points, name) if from_lowest else 0.0
            base = points[lowest] if from_lowest or self.unedited is None else self.unedited
            rise = (points[budget][name] - base[name]) / allowed
            if budget > lowest:  # before its lowest point a cost falls
                rises.append(rise if math.isfinite(rise) else math.inf)
        return max(rises)


def lowest_point(points: Mapping[float, Costs], name: str) -> float:
    """Return the budget at which a cost is lowest; the smallest of several."""

    def rank(budget: float) -> tuple[float, float]:
        cost = points[budget][name]
        return (math.inf if math.isnan(cost) else cost), budget

    return min(points, key=rank)


@dataclass(frozen=True)
class Purchase:
    """The strongest edit within a price.

    Args:
        budget: Its predicted loss, in nats; 0 if no edit is within the price.
        predicted: The same by its report: a layer may be left out, and an edit has steps.
        before: The costs of the unedited model.
        after: The costs of the edited one.
        points: All costs that were measured, by budget; 0 is the unedited model.
        held_out: The costs before and after on data that nothing was chosen on, where there are such data.
        scale: Factor of what is kept of an update.
    """

    budget: float
    predicted: float
    before: Costs
    after: Costs
    points: Mapping[float, Costs]
    held_out: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def warning(self) -> str | None:
        """What a user must not overlook: that other batches say that the model is gone; None if they do not."""
        for name, (before, after) in self.held_out.items():
            if name.endswith("loss") and not after - before < RUINOUS:
                return (
                    f"This edit ruins the model: on batches that did not choose it, {name} is {before:.4g} before and "
                    f"{after:.4g} after. Validate on more batches, or ask for less: budget={self.budget / 4:.2g}."
                )
        return None

    def __str__(self) -> str:
        if not self.budget:
            tried = ", ".join(f"{budget:.2g} nats: {_listed(costs)}" for budget, costs in self.points.items() if budget)
            return f"No edit stays within the price. Before: {_listed(self.before)}; predicted to cost {tried}."
        lines = [
            f"The strongest edit within the price is predicted to cost {self.predicted:.2g} nats. On what chose it: "
            f"{_listed(self.before)} before, {_listed(self.after)} after."
        ]
        if self.scale != 1.0:
            lines.insert(0, f"The update was scaled by {self.scale:g} first, which has the lowest loss.")
        for name, (before, after) in self.held_out.items():
            lines.append(f"On other batches: {name} {before:.4g} before, {after:.4g} after.")
        return "\n".join(lines)


def spend(
    editor: CurvatureEditor,
    module: nn.Module,
    factors: KroneckerFactors,
    measure: Callable[[], Costs],
    price: Price,
    before: Costs | None = None,
) -> Purchase:
    """Find the strongest edit within a price.

    Args:
        editor: Its budget is searched for, and the one that it has does not matter.
        module: The network; edited only while it is measured.
        factors: Its factors.
        measure: Returns the costs of the module as it is, on data to choose by: lower is better. Report on other data.
        price: What the edit may cost.
        before: Costs at the beginning of the path, if they are known: those of the unedited module, or, where updates
            are scaled, of the module with scaled updates alone.

    Returns:
        The edit. No milder edit that was measured exceeds the price.

    Raises:
        ValueError: As :meth:`~lightning_curvature.CurvatureEditor.edit`.
    """
    points: dict[float, Costs] = {0.0: measure() if before is None else before}
    predicted, trial = {0.0: 0.0}, editor.within(price.start)
    budget: float | None = price.start
    while budget is not None and len(points) <= MOST:
        trial = trial.within(budget)
        with trial.applied(module, factors) as report:
            points[budget] = measure()
        predicted[budget] = report.predicted_loss or 0.0
        budget = _next(points, price, everything=report.keeps_nothing)
    chosen, _ = _bracket(points, price)
    return Purchase(chosen, predicted[chosen], points[0.0], points[chosen], dict(sorted(points.items())))


def _listed(costs: Costs) -> str:
    return ", ".join(f"{name} {cost:.4g}" for name, cost in costs.items())


def _bracket(points: Mapping[float, Costs], price: Price) -> tuple[float, float]:
    """Return the largest budget below which nothing exceeds the price, and the smallest one that does, or infinity."""
    exceeding = [budget for budget in points if price.excess(budget, points) > 1.0]
    beyond = min(exceeding, default=math.inf)
    return max(b for b in points if b < beyond), beyond


def _next(points: Mapping[float, Costs], price: Price, everything: bool) -> float | None:
    """Return the budget to try next; None if the search is over.

    Args:
        points: What was measured.
        price: The price.
        everything: Whether the last edit left nothing that a stronger one could remove.
    """
    within, beyond = _bracket(points, price)
    if beyond == math.inf:
        return None if everything else within * STEP
    if within == 0.0:
        return beyond / STEP
    for name, (_, from_lowest) in price.allowed.items():  # a lowest point is one between two that are higher
        lowest = lowest_point(points, name)
        if from_lowest and lowest > 0.0 and not any(lowest / STEP <= budget < lowest for budget in points):
            return lowest / STEP
    is_near = beyond / within <= STEP ** (0.5**REFINEMENTS) * 1.01
    return None if is_near else math.sqrt(within * beyond)
