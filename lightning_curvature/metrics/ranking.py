"""Agreement of two models' next-token rankings, as a torchmetrics metric."""

from typing import Any

from torch import Tensor

from lightning_curvature._checks import check_count
from lightning_curvature.metrics._mean import MeanOverAll
from lightning_curvature.metrics.functional.ranking import _ranking_overlap_update


class RankingOverlap(MeanOverAll):
    r"""Mean nDCG@k of next-token rankings against those of a baseline model.

    The baseline's ``k`` best tokens have relevance :math:`k, k - 1, \ldots, 1`, all others 0. With the relevances
    :math:`r_i` of the edited model's ``k`` best tokens, best first,

    .. math:: \mathrm{nDCG} = \frac{\sum_{i=1}^k r_i / \log_2(i + 1)}{\sum_{i=1}^k (k + 1 - i) / \log_2(i + 1)}

    Equal logits rank in the order of :meth:`torch.Tensor.topk`, so stored ids should come from logits of the same
    dtype and from the same ``k``. Source: arXiv:2510.24256, appendix C.

    - ``update(logits, baseline)``: scores of the edited model, ``[..., V]`` with ``V >= k``, any floating dtype, and
      either scores of the baseline, ``[..., V]``, floating, or its best token ids, best first, int64 ``[..., >= k]``.
      ``ValueError`` if shapes, dtypes or ids do not fit.
    - ``compute()``: a mean over positions in [0, 1], float64 scalar; 1 for identical rankings, NaN before the first
      position.

    Args:
        k: Length of the rankings.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``k`` is no positive integer.

    Example:
        >>> import torch
        >>> metric = RankingOverlap(k=2)
        >>> metric.update(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1, 0]]))
        >>> metric.compute()
        tensor(0.8597, dtype=torch.float64)
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def __init__(self, k: int = 10, **kwargs: Any) -> None:
        self.k = check_count(k, "k")
        super().__init__(arguments={"k": self.k}, **kwargs)

    def update(self, logits: Tensor, baseline: Tensor) -> None:
        """Add a batch."""
        self._add(*_ranking_overlap_update(logits, baseline, self.k))
