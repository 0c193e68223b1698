r"""One strength for all layers, found so that the edit is predicted to cost a budget.

A coefficient of the score ``s`` is kept by ``s / (s + t)`` (soft), or if ``s >= t`` (hard), with one penalty ``t`` for
all layers of an edit. With the mass ``s_ij = lam_i mu_j`` the soft edit is the minimum of the second-order model of the
loss plus ``t/2 ||W||^2`` (of an update: ``t/2 ||W - W0||^2``): what the weights would be, had they been held to zero
(to the start) that much more strongly. The predicted loss of an edit is

.. math:: \sum_{layers} \frac12 \sum_{ij} \lambda_i \mu_j C_{ij}^2 \left(\frac{t}{s_{ij} + t}\right)^2

and rises with ``t``. A layer is summed up by a histogram of its scores, so that any penalty is priced at once.

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
    """

    scores: Tensor
    losses: Tensor

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
    summed = torch.zeros(int(bins.max() - first) + 1 if len(bins) else 0, dtype=losses.dtype, device=losses.device)
    summed.index_add_(0, bins - first, losses[live])
    used = summed.nonzero().flatten()
    middles = ((used + first + 0.5) / _STEPS).exp2().to(losses)
    dropped = losses[~live].sum()  # of no score, and dropped by any penalty
    return LossCurve(torch.cat([dropped.new_zeros(1), middles]).cpu(), torch.cat([dropped[None], summed[used]]).cpu())


def penalty_of(curves: Iterable[LossCurve], budget: float, soft: bool) -> float:
    """Return the largest penalty whose predicted loss over all layers is within a budget.

    Args:
        curves: Curve of each layer.
        budget: Nats per loss position.
        soft: As in :class:`~lightning_curvature.CurvatureEditor`.

    Returns:
        The penalty; infinite if dropping everything is within the budget, 0 if nothing is.
    """
    curves = list(curves)
    scores, losses = (torch.cat([curve[i] for curve in curves]) for i in range(2))
    if float(losses.sum()) <= budget:
        return math.inf
    scores, order = scores.sort()
    losses = losses[order]
    if float(losses[scores == 0].sum()) > budget:
        return 0.0
    if not soft:  # bins lie on one grid: what lies below the lower end of a bin are the bins before it
        within = int((losses.cumsum(0) <= budget).sum())
        lower = math.pow(2.0, -0.5 / _STEPS)
        return float(scores[within]) * lower
    together = LossCurve(scores, losses)
    live = scores[scores > 0].log2()
    low, high = float(live.min()) - 60, float(live.max()) + 60
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if together.at(2.0**middle, soft) <= budget else (low, middle)
    return math.pow(2.0, low)


def kept_shares(scores: Tensor, penalty: float, soft: bool) -> Tensor:
    """Return the share of each coefficient that an edit of a penalty keeps, float64 ``[d_out, d_in]``."""
    if penalty == math.inf:
        return torch.zeros_like(scores)
    if not soft:
        return ((scores >= penalty) & (scores > 0)).to(scores)
    return torch.where(scores > 0, scores / (scores + penalty), torch.zeros_like(scores))
