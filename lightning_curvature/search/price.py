"""The strongest edit that a price allows, found by few measurements.

An edit has one strength, the budget of predicted loss. The cost of stronger and stronger edits falls at first, where
over-confidence or a fine-tune's over-fitting goes, and then rises. The price is how far it may rise above the unedited
model's, or above its lowest point on that path, so that what an edit gains first is not spent.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lightning_curvature.editing.budget import careful_budget
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.report import RUINOUS
from lightning_curvature.factors.kronecker import KroneckerFactors

NEAR, AIM = 0.8, 0.9
"""An edit that uses this share of the price is strong enough; the search aims between it and all of the price."""
STEP = 4.0
"""A factor between two budgets, where nothing says how far to go."""
NARROW = 1.4
"""The search ends where a budget within the price, and one beyond it, are no farther apart than this factor."""
SCALES = (0.8, 0.6, 0.4)
"""Shares of an update that are tried before its edit, as long as the loss falls."""
SMALLEST = STEP**-8
"""No budget below this part of the first one is tried: such an edit hardly removes anything."""
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

    def used(self, budget: float, points: Mapping[float, Costs]) -> float:
        """Return :meth:`excess` as a number to interpolate: also below 0."""
        rises = []
        for name, (allowed, from_lowest) in self.allowed.items():
            lowest = lowest_point(points, name)
            base = points[lowest] if from_lowest else points[0.0] if self.unedited is None else self.unedited
            falls_still = from_lowest and budget < lowest
            rises.append(0.0 if falls_still else (points[budget][name] - base[name]) / allowed)
        return max(rises)


def lowest_point(points: Mapping[float, Costs], name: str) -> float:
    """Return the budget at which a cost is lowest; the smallest of several."""
    costs = {budget: math.inf if math.isnan(of_edit[name]) else of_edit[name] for budget, of_edit in points.items()}
    return min(points, key=lambda budget: (costs[budget], budget))


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
        name: Of what it edits, if that was chosen among several candidates.
        tried: Where it was: by candidate, all costs that were measured, by budget; 0 is the unedited model.
    """

    budget: float
    predicted: float
    before: Costs
    after: Costs
    points: Mapping[float, Costs]
    held_out: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    scale: float = 1.0
    name: str = ""
    tried: Mapping[str, Mapping[float, Costs]] = field(default_factory=dict)

    @property
    def warning(self) -> str | None:
        """What a user must not overlook, that other batches say that the model is gone; None if they do not."""
        for name, (before, after) in self.held_out.items():
            if name.endswith("loss") and not after - before < RUINOUS:
                return (
                    f"This edit ruins the model: on batches that did not choose it, {name} is {before:.4g} before and "
                    f"{after:.4g} after. Validate on more batches, or ask for less: budget={self.budget / 4:.2g}."
                )
        return None

    def __str__(self) -> str:
        if not self.budget and self.name:
            return (
                "No edit closes the gap between training and validation without harm. Before: "
                f"{_listed(self.before)}. Try other layers (layers=), or name a strength (budget=, energy=)."
            )
        if not self.budget:
            tried = ", ".join(f"{budget:.2g} nats: {_listed(costs)}" for budget, costs in self.points.items() if budget)
            return f"No edit stays within the price. Before: {_listed(self.before)}; predicted to cost {tried}."
        which = "The strongest edit within the price"
        if self.name:
            which = f"The edit that closes most of the gap between training and validation ({self.name})"
        lines = [
            f"{which} is predicted to cost {self.predicted:.2g} nats.",
            f"On what chose it: {_listed(self.before)} before, {_listed(self.after)} after.",
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


def spend_on_update(
    editor: CurvatureEditor,
    module: nn.Module,
    factors: KroneckerFactors,
    measure: Callable[[], Costs],
    price: Price,
    total: Callable[[Costs], float],
    unedited: Costs | None = None,
) -> Purchase:
    """Find the strongest edit of updates within a price: they are scaled first, as long as that lowers the loss.

    Fine-tuning over-fits in directions of high curvature, too, which no edit by curvature takes away. The update times
    0.8, 0.6, 0.4 is tried, and the path of stronger and stronger edits begins where the loss is lowest.

    Args:
        editor: As :func:`spend`; it has a reference, or the module adapters. A scale of its own below 1 stays.
        module: As :func:`spend`.
        factors: As :func:`spend`.
        measure: As :func:`spend`.
        price: As :func:`spend`.
        total: Returns the loss, given the costs.
        unedited: Costs of the unedited module, if they are known.
    """
    unedited = measure() if unedited is None else unedited
    price = dataclasses.replace(price, unedited=unedited)
    best, costs = copy.copy(editor), unedited
    if editor.scale != 1.0:
        with editor.at(1.0).applied(module, factors):
            costs = measure()
    for scale in SCALES if editor.scale == 1.0 else ():
        scaled = best.at(1.0)
        scaled.scale = scale
        with scaled.applied(module, factors):
            there = measure()
        if not total(there) < total(costs) or price.excess(1.0, {0.0: costs, 1.0: there}) > 1.0:
            break
        best, costs = scaled, there
    purchase = spend(best, module, factors, measure, price, costs)
    return dataclasses.replace(purchase, before=unedited, scale=best.scale)


def spend_shares(
    editor: CurvatureEditor, module: nn.Module, factors: KroneckerFactors, used: Callable[[], Costs]
) -> Purchase:
    """Find the strongest soft edit of updates within limits, as :func:`spend_on_update` does.

    Args:
        editor: As :func:`spend_on_update`; the search starts at its budget, if it has one.
        module: As :func:`spend`.
        factors: As :func:`spend`.
        used: Returns the share of each limit that the module as it is uses: 0 before the edit, below 0 if it is better.
    """
    unedited = used()
    start = editor.budget or careful_budget(soft=True, of_one_layer=False)
    price = Price(dict.fromkeys(unedited, (1.0, False)), start)
    return spend_on_update(editor, module, factors, used, price, lambda costs: sum(costs.values()), unedited)


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
    is_near = within > 0 and price.used(within, points) >= NEAR
    if beyond == math.inf and not is_near:
        return None if everything else within / _factor(points, price, within)
    if within == 0.0:
        smallest = price.start * SMALLEST
        return None if beyond <= smallest else max(beyond / _factor(points, price, beyond), smallest)
    for name, (_, from_lowest) in price.allowed.items():  # a lowest point is one between two that are higher
        lowest = lowest_point(points, name)
        if from_lowest and lowest > 0.0 and not any(lowest / STEP <= budget < lowest for budget in points):
            return lowest / STEP
    if is_near or beyond / within <= NARROW:
        return None
    low, high = price.used(within, points), price.used(beyond, points)
    # The cost rises ever faster on a logarithmic scale, so that this lies on the safe side.
    share = (AIM - low) / (high - low) if low < AIM < high < math.inf else 0.5
    return within * math.pow(beyond / within, min(max(share, 0.2), 0.8))


def _factor(points: Mapping[float, Costs], price: Price, budget: float) -> float:
    """Return by what to divide the largest or the smallest budget that was measured, if costs rise as a power of it.

    The power is 1 until there are two edits to tell it by.
    """
    first = price.used(0.0, points)
    rises = {tried: price.used(tried, points) - first for tried in points if tried}
    there, is_within = rises.pop(budget), price.used(budget, points) <= 1.0
    smallest, largest = (STEP**-2, STEP**-0.5) if is_within else (STEP**0.5, STEP**4)
    if not 0.0 < there < math.inf or first >= AIM:
        return 1 / STEP if is_within else STEP**2
    power = 1.0
    if rises:
        other = min(rises, key=lambda tried: abs(math.log(tried / budget)))
        if 0.0 < rises[other] < math.inf:
            power = max(math.log(there / rises[other]) / math.log(budget / other), 0.1)
    ratio = math.log(there / (AIM - first)) / power
    return math.exp(min(max(ratio, math.log(smallest)), math.log(largest)))
