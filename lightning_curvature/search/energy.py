"""The energy that a user can afford: the strongest edit whose cost stays within a limit.

Energies cannot be compared: the same number removes more from one model than from another, and more with factors of few
positions than of many. What can be said beforehand is what the edit may cost: "at most 1.1 times the perplexity".
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from lightning_curvature.editing.base import DEFAULT_ENERGY, Editor
from lightning_curvature.factors.kronecker import KroneckerFactors

SLACK = 0.005
"""A cost that falls by more than this while the edit gets stronger is not monotone; relative."""
NARROW = 1e-4
"""Width of the bracket, relative to what the lower end drops, at which the search ends: few examples make steps."""
FLOOR, CEILING = 0.05, 1 - 1e-12
"""Energies between which is searched."""
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)
"""Energies that are tried, too, if they are above the one that was found: a cost can rise and fall again."""


@dataclass(frozen=True)
class Match:
    """The strongest edit within a limit.

    Args:
        energy: Its energy, in (0, 1].
        value: What it makes of the metric, as a multiple of what it was.
        points: All multiples that were measured, by energy.
    """

    energy: float
    value: float
    points: Mapping[float, float]

    def violations(self, higher_is_better: bool = False) -> list[tuple[float, float]]:
        """Return pairs of neighbouring energies of which the lower one costs less, while the higher one costs."""
        sign = -1.0 if higher_is_better else 1.0
        costs = [
            (energy, sign * math.log(value)) for energy, value in sorted(self.points.items()) if 0 < value < math.inf
        ]
        return [
            (low, high)
            for (low, stronger), (high, milder) in pairwise(costs)
            if milder > SLACK and milder - stronger > SLACK
        ]


def match_energy(
    editor: Editor,
    module: nn.Module,
    factors: KroneckerFactors,
    measure: Callable[[], float],
    limit: float,
    *,
    higher_is_better: bool = False,
    tolerance: float = 0.001,
    points: Mapping[float, float] | None = None,
    before: float | None = None,
) -> Match:
    """Find the strongest edit whose cost stays within a limit, by bracketing.

    No milder edit that was tried is beyond the limit; a few energies of a grid are always among those.

    Args:
        editor: Any editor; its energy is what is searched for, and its own one does not matter.
        module: The network; edited only while it is measured.
        factors: Its factors.
        measure: Measures the module as it is, on data to choose by: a positive number, perplexity for example. Report
            on other data.
        limit: What the metric may become, as a multiple of what it is for the unedited module: at most 1.1 times the
            perplexity, at least 0.99 times the accuracy.
        higher_is_better: Whether the metric is a benefit, such as accuracy, and not a cost.
        tolerance: Relative distance from the limit at which the search may end, always on the allowed side.
        points: Multiples by energy that another search of the same edit has measured.
        before: The metric of the unedited module, if it is known already.

    Returns:
        The energy, what it costs, and all that was measured. There are warnings where no edit is within the limit (the
        energy is 1 then), where every one is (the metric hardly sees these layers), and where a stronger edit is known
        to be within it while a milder one is not.

    Raises:
        ValueError: If the unedited module's metric is not a positive number, or the limit is not positive.

    Example:
        >>> import torch
        >>> from lightning_curvature import CurvatureEditor, LayerFactors
        >>> layer = nn.Sequential(nn.Linear(8, 8, bias=False))
        >>> _ = nn.init.eye_(layer[0].weight)
        >>> moment = torch.diag(torch.arange(1.0, 9.0))
        >>> factors = KroneckerFactors({"0": LayerFactors(A=moment, G=moment, num_inputs=9, num_gradients=9)})
        >>> size = lambda: float(layer[0].weight.detach().norm())
        >>> match = match_energy(CurvatureEditor(), layer, factors, size, 0.8, higher_is_better=True)
        >>> round(match.value, 3)  # six of eight diagonal entries are kept, and five would be too few
        0.866
    """
    if not limit > 0:
        raise ValueError(f"A limit is a positive multiple of the metric, found {limit!r}.")
    before = measure() if before is None else before
    if not 0 < before < math.inf:
        raise ValueError(f"The metric of the unedited module must be a positive number, found {before!r}.")
    sign = -1.0 if higher_is_better else 1.0
    found, trial = dict(points or {}), editor.at(1.0)

    def cost(energy: float) -> float:
        """Return what an edit costs, the logarithm of a multiple."""
        if energy not in found:
            with trial.at(energy).applied(module, factors):
                found[energy] = measure() / before
        return sign * math.log(found[energy]) if 0 < found[energy] < math.inf else math.inf

    allowed = sign * math.log(limit)
    costs = {energy: cost(energy) for energy in sorted({1.0, *found})}
    low = max((energy for energy in costs if costs[energy] > allowed and energy < 1.0), default=0.0)
    high = min(energy for energy in costs if energy > low)  # nothing milder is beyond the limit
    slack = min(math.log1p(tolerance), abs(allowed) / 2)
    while costs[1.0] <= allowed:
        near = high < 1.0 and allowed - slack <= costs[high]
        if not near and high > FLOOR and low < CEILING and high - low > NARROW * (1 - low):
            middle = _between((low, costs.get(low, math.inf)), (high, costs[high]), allowed - slack / 2)
        elif (untried := next((energy for energy in GRID if energy > high and energy not in costs), None)) is not None:
            middle = untried
        else:
            break
        costs[middle] = cost(middle)
        if costs[middle] > allowed:
            low = middle
            high = min(energy for energy in costs if energy > low)
        else:
            high = min(high, middle)
    match = Match(high, found[high], dict(sorted(found.items())))
    if lower := [energy for energy in costs if energy < low and costs[energy] <= allowed]:
        warnings.warn(
            f"The metric is not monotone in the energy: {low:.4g} is beyond the limit, and the stronger edit of "
            f"{min(lower):.4g} is not. Chosen is {high:.4g}, above both; look at a sweep.",
            stacklevel=2,
        )
    if high <= FLOOR:
        warnings.warn(
            f"Every edit that was tried stays within {limit:g} times the metric: even the energy {high:.3g} makes it "
            f"{match.value:.4g} times. It hardly depends on these layers; measure on other data.",
            stacklevel=2,
        )
    if high == 1.0:
        warnings.warn(
            f"No edit stays within {limit:g} times the metric: "
            + ", ".join(f"{value:.4g} times at the energy {energy:.4g}" for energy, value in match.points.items()),
            stacklevel=2,
        )
    return match


def _between(low: tuple[float, float], high: tuple[float, float], wanted: float) -> float:
    """Return an energy between two ends (energy, cost), near the wanted cost if that is a power of what is dropped."""
    (left, more), (right, less) = low, high
    guess = (left + right) / 2
    if not math.isfinite(more) and left < DEFAULT_ENERGY < right == 1.0:
        return DEFAULT_ENERGY
    if math.isfinite(more) and wanted > 0 and (less > 0 or right == 1.0):  # between a cost and none is a step: halve
        bent = less > 0 and right < 1
        power = math.log(more / less) / math.log((1 - left) / (1 - right)) if bent else 2.0
        guess = 1 - (1 - left) * (wanted / more) ** (1 / power)
    margin = 0.05 * (right - left)  # so much of the bracket goes with each step, whatever the curve looks like
    return min(max(guess, left + margin), right - margin)
