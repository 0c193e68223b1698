"""How much of a memorized continuation a model still writes, as torchmetrics metrics."""

from typing import Any

import torch
from torch import Tensor

from lightning_curvature._checks import check_share
from lightning_curvature.metrics._mean import MeanOverAll
from lightning_curvature.metrics.functional.memorization import (
    _loose_memorization_update,
    _normalized_edit_distance_update,
    _strict_memorization_update,
    longest_exact_prefix,
)


class StrictMemorization(MeanOverAll):
    """Share of sequences that are written exactly.

    Source: arXiv:2510.24256, sections 4 and 5 (strict match).

    - ``update(preds, target)``: written and memorized token ids, int64 ``[n, L]``; fill shorter outputs with an id that
      is no token, for example -1. ``ValueError`` if shapes or dtypes do not fit.
    - ``compute()``: a fraction in [0, 1], float32 scalar; NaN before the first sequence.

    Example:
        >>> metric = StrictMemorization()
        >>> metric.update(torch.tensor([[1, 2, 3], [4, 5, -1]]), torch.tensor([[1, 2, 3], [4, 5, 6]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    plot_upper_bound = 1.0
    total_dtype = torch.int64

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._add(*_strict_memorization_update(preds, target))


class LooseMemorization(MeanOverAll):
    r"""Share of sequences that are written almost exactly.

    The similarity of a sequence is :math:`1 - d / L` with the Levenshtein distance :math:`d` of the token ids. One
    that equals the threshold counts, whatever the rounding. Source: arXiv:2510.24256, sections 4 and 5 (loose match).

    - ``update(preds, target)``: written and memorized token ids, int64 ``[n, L]``; fill shorter outputs with an id that
      is no token, for example -1. ``ValueError`` if shapes or dtypes do not fit.
    - ``compute()``: a fraction in [0, 1], float32 scalar; NaN before the first sequence.

    Args:
        threshold: Least similarity that counts, in (0, 1].
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the threshold is out of range.

    Example:
        >>> metric = LooseMemorization(threshold=0.75)
        >>> metric.update(torch.tensor([[2, 3, 4, 9], [5, 6, 7, 9]]), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False
    plot_upper_bound = 1.0
    total_dtype = torch.int64

    def __init__(self, threshold: float = 0.75, **kwargs: Any) -> None:
        self.threshold = check_share(threshold, "threshold")
        super().__init__(arguments={"threshold": self.threshold}, **kwargs)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._add(*_loose_memorization_update(preds, target, self.threshold))


class NormalizedEditDistance(MeanOverAll):
    """Mean Levenshtein distance of the token ids, divided by the length.

    Source: arXiv:2510.24256, sections 4 and 5.

    - ``update(preds, target)``: written and memorized token ids, int64 ``[n, L]``; fill shorter outputs with an id that
      is no token, for example -1. ``ValueError`` if shapes or dtypes do not fit.
    - ``compute()``: a mean over sequences in [0, 1], float64 scalar; NaN before the first sequence.

    Example:
        >>> metric = NormalizedEditDistance()
        >>> metric.update(torch.tensor([[2, 3, 4, 9]]), torch.tensor([[1, 2, 3, 4]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._add(*_normalized_edit_distance_update(preds, target))


class LongestExactPrefix(MeanOverAll):
    """Mean number of tokens that are written exactly before the first wrong one.

    Source: arXiv:2510.24256, appendix G (positional stress test).

    - ``update(preds, target)``: written and memorized token ids, int64 ``[n, L]``; fill shorter outputs with an id that
      is no token, for example -1. ``ValueError`` if shapes or dtypes do not fit.
    - ``compute()``: tokens in [0, L], float32 scalar; NaN before the first sequence.

    Example:
        >>> metric = LongestExactPrefix()
        >>> metric.update(torch.tensor([[1, 2, 9, 4], [9, 6, 7, 8]]), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = False
    total_dtype = torch.int64

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        lengths = longest_exact_prefix(preds, target)
        self._add(lengths.sum(), torch.tensor(len(lengths), device=lengths.device))
