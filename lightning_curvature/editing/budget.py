r"""One strength for all layers of an edit, found before any of them is edited.

A coefficient of the score ``s`` is kept by ``s / (s + t)`` (soft), or if ``s >= t`` (hard), with one penalty ``t`` for
all layers of an edit. With the mass ``s_ij = lam_i mu_j`` the soft edit is the minimum of the second-order model of the
loss plus ``t/2 ||W||^2`` (of an update: ``t/2 ||W - W0||^2``): what the weights would be, had they been held to zero
(to the start) that much more strongly. The predicted loss of an edit is

.. math:: \sum_{layers} \frac12 \sum_{ij} \lambda_i \mu_j C_{ij}^2 \left(\frac{t}{s_{ij} + t}\right)^2

and rises with ``t``: a budget of it determines ``t``, and so does the share of all scores that is kept, an energy.
Instead of one penalty, whose scope is the model, all layers may keep one share of their scores each, whose scope is the
layer: another penalty in each of them. A layer is summed up by a histogram of its scores, so that any penalty is priced
at once. Pruning calls the two scopes global and local.

Source: MacKay 1992, "A practical Bayesian framework for backpropagation networks" (the second-order model with a
prior); LeCun et al. 1989, Optimal Brain Damage (the price of a coefficient).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 32
"""Bins of a histogram for each power of two of the score: a bin is 2 % wide."""
_LOWER = math.pow(2.0, -0.5 / _STEPS)
"""The lower end of a bin, as a multiple of its middle."""


def careful_budget(soft: bool, of_one_layer: bool) -> float:
    """Return a budget for an edit that nothing measures, in nats: what an edit costs is more than is predicted.

    The more layers move together, the more it is; see "What is edited where nobody says it" in ``docs/decisions.md``.

    Args:
        soft: Whether coefficients are shrunk: all of them move then.
        of_one_layer: Whether a single layer is edited.
    """
    if soft:
        return 0.0003
    return 0.02 if of_one_layer else 0.002


class LossCurve(NamedTuple):
    """What it costs to shrink the coefficients of a layer, for every penalty.

    Args:
        scores: Scores, float64 ``[n]``, ascending: the middle of each bin that is not empty.
        losses: What it costs to drop the coefficients of each bin, nats per loss position, float64 ``[n]``.
        masses: Sum of the scores of each bin, float64 ``[n]``.
    """

    scores: Tensor
    losses: Tensor
    masses: Tensor

    def at(self, penalty: float, soft: bool) -> float:
        """Return the predicted loss of an edit of a penalty, in nats per loss position."""
        if soft:
            return float((self.losses * (penalty / (self.scores + penalty)).square()).sum())
        return float(self.losses[self.scores < penalty].sum())


def loss_curve(scores: Tensor, losses: Tensor) -> LossCurve:
    """Return the curve of a layer.

    Args:
        scores: Score of each coefficient, float64 ``[d_out, d_in]``, none negative.
        losses: What it costs to drop it, nats per loss position, float64 ``[d_out, d_in]``.

    Example:
        >>> curve = loss_curve(torch.tensor([[1.0, 4.0]]).double(), torch.tensor([[0.5, 8.0]]).double())
        >>> curve.at(2.0, soft=False), round(curve.at(4.0, soft=True), 1)
        (0.5, 2.3)
    """
    scores, losses = scores.flatten(), losses.flatten()
    live = scores > 0
    bins = (scores[live].log2() * _STEPS).floor().long()
    first = bins.min() if len(bins) else bins.new_zeros(())
    sums = losses.new_zeros(2, int(bins.max() - first) + 1 if len(bins) else 0)
    sums.index_add_(1, bins - first, torch.stack([losses[live], scores[live].to(losses)]))
    used = sums[1].nonzero().flatten()
    middles = ((used + first + 0.5) / _STEPS).exp2().to(losses)
    dropped = torch.stack([losses[~live].sum(), losses.new_zeros(())])  # of no score, and dropped by any penalty
    at_zero = torch.cat([dropped[:, None], sums[:, used]], 1).cpu()
    return LossCurve(torch.cat([middles.new_zeros(1), middles]).cpu(), *at_zero)


def penalty_of(curves: Iterable[LossCurve], budget: float, soft: bool) -> float:
    """Return the largest penalty whose predicted loss over all layers is within a budget.

    Args:
        curves: Curve of each layer.
        budget: Nats per loss position.
        soft: As in :class:`~lightning_curvature.CurvatureEditor`.

    Returns:
        The penalty; infinite if dropping everything is within the budget, 0 if nothing is.
    """
    scores, losses, masses = together(curves)
    if float(losses.sum()) <= budget:
        return math.inf
    if float(losses[scores == 0].sum()) > budget:
        return 0.0
    if not soft:  # bins lie on one grid: what lies below the lower end of a bin are the bins before it
        within = int((losses.cumsum(0) <= budget).sum())
        return float(scores[within]) * _LOWER
    curve, live = LossCurve(scores, losses, masses), scores[scores > 0].log2()
    low, high = float(live.min()) - 60, float(live.max()) + 60
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if curve.at(2.0**middle, soft) <= budget else (low, middle)
    return math.pow(2.0, low)


def together(curves: Iterable[LossCurve]) -> LossCurve:
    """Return the curve of several layers that have one penalty."""
    scores, losses, masses = (torch.cat(parts) for parts in zip(*curves, strict=True))
    scores, order = scores.sort()
    return LossCurve(scores, losses[order], masses[order])


def penalty_keeping(curve: LossCurve, energy: float, soft: bool) -> float:
    """Return the penalty under which a share of the scores is kept, at least.

    Args:
        curve: The curve of all layers, see :func:`together`.
        energy: Share of the scores to keep, in (0, 1).
        soft: As in :class:`~lightning_curvature.CurvatureEditor`.
    """
    if soft:
        return float(_soft_penalties(curve.scores[None], curve.masses[None], energy))
    lost = curve.masses.cumsum(0) <= (1 - energy) * curve.masses.sum()
    return float(curve.scores[min(int(lost.sum()), len(lost) - 1)]) * _LOWER


def energy_within(curves: Iterable[LossCurve], budget: float, soft: bool) -> float:
    """Return the smallest share of its scores that each layer may keep, so that all are predicted to cost a budget.

    Args:
        curves: Curve of each layer.
        budget: Nats per loss position.
        soft: As in :class:`~lightning_curvature.CurvatureEditor`.

    Returns:
        The share, in (0, 1]: 1 if nothing is within the budget.
    """
    scores, losses, masses = (
        torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in zip(*curves, strict=True)
    )

    def loss(energy: float) -> float:
        if soft:
            penalties = _soft_penalties(scores, masses, energy)[:, None]
            return float((losses * (penalties / (scores + penalties)).square()).sum())
        # The bins of the smallest scores go, and of the bin in which the share is reached a part.
        lost = (1 - energy) * masses.sum(1, keepdim=True) - (masses.cumsum(1) - masses)
        parts = torch.where(masses > 0, lost / masses, torch.ones_like(masses)).clamp(0, 1)
        return float((losses * parts).sum())

    low, high = -60.0, 60.0  # of the logarithm of kept to lost scores
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if loss(1 / (1 + math.exp(-middle))) <= budget else (middle, high)
    return 1 / (1 + math.exp(-high))


def _soft_penalties(scores: Tensor, masses: Tensor, energy: float) -> Tensor:
    """Return for each row of bins the penalty under which a share of the scores is kept, float64 ``[rows]``."""
    live = scores[scores > 0].log2()
    if not len(live):
        return scores.new_zeros(len(scores))
    low, high = (masses.new_full((len(masses),), float(end)) for end in (live.min() - 60, live.max() + 60))
    for _ in range(50):
        middle = (low + high) / 2
        kept = (masses * (scores / (scores + middle.exp2()[:, None]))).sum(1)
        is_more = kept > energy * masses.sum(1)
        low, high = torch.where(is_more, middle, low), torch.where(is_more, high, middle)
    return high.exp2()


def kept_shares(scores: Tensor, penalty: float, soft: bool) -> Tensor:
    """Return the share of each coefficient that an edit of a penalty keeps, float64 ``[d_out, d_in]``."""
    if penalty == math.inf:
        return torch.zeros_like(scores)
    if not soft:
        return ((scores >= penalty) & (scores > 0)).to(scores)
    return torch.where(scores > 0, scores / (scores + penalty), torch.zeros_like(scores))
