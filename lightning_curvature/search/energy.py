"""The energy that a user can afford: the strongest edit whose cost stays within a limit.

Energies of different models cannot be compared: the same number removes more from one model than from another, and more
with factors of few positions than of many. A user can say instead what the edit may cost: "at most 1.1 times the
perplexity".

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

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from lightning_curvature.editing.base import DEFAULT_ENERGY, Editor
from lightning_curvature.factors.kronecker import KroneckerFactors

SLACK = 0.005
"""A cost that falls by more than this, relatively, while the edit gets stronger is not monotone."""
NARROW = 1e-4
"""The search ends when the bracket is this narrow, relative to what its lower end drops.

A metric of few examples has steps, where no energy comes near the limit."""
FLOOR, CEILING = 0.05, 1 - 1e-12
"""The search runs between these energies."""
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.3, 0.1)
"""In the end, the energies of this grid above the chosen one are tried too: a cost can rise and fall again."""


@dataclass(frozen=True)
class Match:
    """The strongest edit within a limit.

    Args:
        energy: Energy of that edit, in (0, 1].
        value: The metric after the edit, as a multiple of the metric before it.
        points: All multiples that were measured, by energy.
    """

    energy: float
    value: float
    points: Mapping[float, float]

    def violations(self, higher_is_better: bool = False) -> list[tuple[float, float]]:
        """Return pairs of neighbouring energies, lower one first, at which the stronger edit costs clearly less."""
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
    found: Callable[[float], str] = "{:.4g} times the metric".format,
) -> Match:
    """Find the strongest edit whose cost stays within a limit, by bracketing.

    No milder edit that was tried exceeds the limit, and a few energies of a grid are always tried.

    Args:
        editor: Any editor; its energy is searched for, and the energy that it has does not matter.
        module: The network; edited only while it is measured.
        factors: Its factors.
        measure: Measures the module as it is, on data to choose by: a positive number, perplexity for example. Report
            on other data.
        limit: Largest (with ``higher_is_better``, smallest) multiple of the unedited module's metric: at most 1.1 times
            the perplexity, at least 0.99 times the accuracy.
        higher_is_better: Whether the metric is a benefit, such as accuracy, and not a cost.
        tolerance: Relative distance from the limit at which the search may end, always on the allowed side.
        points: Multiples by energy that another search of the same edit has measured.
        before: The metric of the unedited module, if it is known already.
        found: Says a multiple in a warning.

    Returns:
        The energy, what it costs, and all that was measured. Warnings tell if no edit is within the limit (the energy
        is 1 then), if every edit is (the metric hardly depends on these layers), and if a stronger edit is within the
        limit although a milder one is not.

    Raises:
        ValueError: If the unedited module's metric is not a positive number, or the limit is not positive.
    """
    if not limit > 0:
        raise ValueError(f"A limit is a positive multiple of the metric, found {limit!r}.")
    before = measure() if before is None else before
    if not 0 < before < math.inf:
        raise ValueError(f"The metric of the unedited module must be a positive number, found {before!r}.")
    sign = -1.0 if higher_is_better else 1.0
    allowed, multiples, trial = sign * math.log(limit), dict(points or {}), editor.at(1.0)
    costs = {energy: _cost(multiple, sign) for energy, multiple in multiples.items()}
    energy: float | None = 1.0
    while energy is not None:
        if energy not in costs:
            with trial.at(energy).applied(module, factors):
                multiples[energy] = measure() / before
            costs[energy] = _cost(multiples[energy], sign)
        energy = _next_energy(costs, allowed, tolerance)
    _, chosen = _bracket(costs, allowed)
    match = Match(chosen, multiples[chosen], dict(sorted(multiples.items())))
    _warn(match, costs, allowed, limit, found)
    return match


def _cost(multiple: float, sign: float) -> float:
    """Return the cost of an edit: the logarithm of a multiple, with a sign; infinite if it is no positive number."""
    return sign * math.log(multiple) if 0 < multiple < math.inf else math.inf


def _bracket(costs: Mapping[float, float], allowed: float) -> tuple[float, float]:
    """Return the highest energy (0 if there is none) whose edit exceeds the limit, and the next higher one.

    No edit at the second energy or above it exceeds the limit, apart from the energy 1, which is no edit.
    """
    low = max((energy for energy in costs if costs[energy] > allowed and energy < 1.0), default=0.0)
    return low, min(energy for energy in costs if energy > low)


def _next_energy(costs: Mapping[float, float], allowed: float, tolerance: float) -> float | None:
    """Return the energy to try next; None if the search is over.

    Args:
        costs: Costs of the energies that were tried, 1 among them.
        allowed: The largest allowed cost.
        tolerance: As in :func:`match_energy`.
    """
    if costs[1.0] > allowed:
        return None
    low, high = _bracket(costs, allowed)
    slack = min(math.log1p(tolerance), abs(allowed) / 2)
    is_near = high < 1.0 and allowed - slack <= costs[high]
    if not is_near and high > FLOOR and low < CEILING and high - low > NARROW * (1 - low):
        return _between((low, costs.get(low, math.inf)), (high, costs[high]), allowed - slack / 2)
    return next((energy for energy in GRID if energy > high and energy not in costs), None)


def _between(low: tuple[float, float], high: tuple[float, float], wanted: float) -> float:
    """Return an energy between the ends of a bracket at which the cost may be the wanted one.

    The guess takes the cost for a power of what is dropped, ``1 - energy``; without costs to fit, it is the middle.

    Args:
        low: Energy and cost of the lower end.
        high: Energy and cost of the higher end.
        wanted: Cost to meet.
    """
    (low_energy, low_cost), (high_energy, high_cost) = low, high
    if not math.isfinite(low_cost) and low_energy < DEFAULT_ENERGY < high_energy == 1.0:
        return DEFAULT_ENERGY
    guess = (low_energy + high_energy) / 2
    # Between a cost and no cost there is a step, which no power fits; below the energy 1 it is halved.
    if math.isfinite(low_cost) and wanted > 0 and (high_cost > 0 or high_energy == 1.0):
        power = 2.0
        if high_cost > 0 and high_energy < 1:
            power = math.log(low_cost / high_cost) / math.log((1 - low_energy) / (1 - high_energy))
        guess = 1 - (1 - low_energy) * (wanted / low_cost) ** (1 / power)
    margin = 0.05 * (high_energy - low_energy)  # each step takes at least this much off the bracket
    return min(max(guess, low_energy + margin), high_energy - margin)


def _warn(
    match: Match, costs: Mapping[float, float], allowed: float, limit: float, found: Callable[[float], str]
) -> None:
    """Warn of a result that needs a look; arguments as in :func:`_next_energy` and :func:`match_energy`."""
    low, _ = _bracket(costs, allowed)
    if stronger := [energy for energy in costs if energy < low and costs[energy] <= allowed]:
        warnings.warn(
            f"The metric is not monotone in the energy: {low:.4g} is beyond the limit, and the stronger edit of "
            f"{min(stronger):.4g} is not. Chosen is {match.energy:.4g}, above both; look at a sweep.",
            stacklevel=3,
        )
    if match.energy <= FLOOR:
        warnings.warn(
            f"Every edit that was tried stays within {found(limit)}: even the energy {match.energy:.3g} "
            f"makes it {found(match.value)}. It hardly depends on these layers; measure on other data.",
            stacklevel=3,
        )
    if match.energy == 1.0:
        warnings.warn(
            f"No edit stays within {found(limit)}: "
            + ", ".join(f"{found(value)} at the energy {energy:.4g}" for energy, value in match.points.items()),
            stacklevel=3,
        )
