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

from lightning_curvature.editor import Editor
from lightning_curvature.factors import KroneckerFactors

SLACK = 0.005
"""A cost that falls by more than this share while the edit gets stronger is not monotone."""
NARROW = 2e-4
"""Width of the bracket of energies at which the search ends in any case: a metric over few examples has steps."""


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
        """Return pairs of neighbouring energies, the lower one first, where the stronger edit costs less."""
        sign = -1.0 if higher_is_better else 1.0
        ordered = sorted(self.points.items())
        return [(low, high) for (low, one), (high, two) in pairwise(ordered) if sign * (two - one) > SLACK * two]


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
) -> Match:
    """Find the strongest edit whose cost stays within a limit, by bracketing.

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

    Returns:
        The energy, what it costs, and all that was measured. Where no edit at all is within the limit, the energy 1,
        with a warning; a cost that does not rise as the edit gets stronger is a warning, too.

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
    before = measure()
    if not 0 < before < math.inf:
        raise ValueError(f"The metric of the unedited module must be a positive number, found {before!r}.")
    sign = -1.0 if higher_is_better else 1.0
    found = {1.0: 1.0, **(points or {})}

    def excess(energy: float) -> float:
        """Return by how much an edit is beyond the limit, in logarithms; below 0 it is allowed."""
        if energy not in found:
            with editor.at(energy).applied(module, factors):
                found[energy] = measure() / before
        value = found[energy]
        if not 0 < value < math.inf:  # not-a-number is more than allowed
            return math.inf if not (higher_is_better and value == math.inf) else -math.inf
        return sign * (math.log(value) - math.log(limit))

    known = {energy: excess(energy) for energy in sorted(found)}
    high = min((energy for energy, over in known.items() if over <= 0), default=1.0)
    low = max((energy for energy, over in known.items() if energy < high), default=0.0)
    over_high, over_low = known[high], known.get(low, math.inf)
    close = math.log1p(tolerance)
    while high - low > NARROW and not -close <= over_high <= 0:
        middle = _between(low, high, over_low, over_high)
        over = excess(middle)
        if over <= 0:
            high, over_high = middle, over
        else:
            low, over_low = middle, over
    match = Match(high, found[high], dict(sorted(found.items())))
    if match.violations(higher_is_better):
        warnings.warn(
            f"The metric is not monotone in the energy, between {match.violations(higher_is_better)}. The energy "
            f"{high:.4g} is within the limit, but it may not be the only strongest edit; look at a sweep.",
            stacklevel=2,
        )
    if high == 1.0:
        warnings.warn(
            f"No edit stays within {limit:g} times the metric: already at the energy {low:.4g} it becomes "
            f"{found.get(low, math.nan):.4g} times.",
            stacklevel=2,
        )
    return match


def _between(low: float, high: float, over_low: float, over_high: float) -> float:
    """Return where a line between two known points meets the limit, or the middle where it would not move enough."""
    middle = (low + high) / 2
    if not (math.isfinite(over_low) and math.isfinite(over_high)) or over_low - over_high > 1.0:
        return middle
    share = -over_high / (over_low - over_high)
    # A tenth of the bracket goes with each step, whatever the curve looks like.
    return high - (high - low) * min(max(share, 0.1), 0.9)
