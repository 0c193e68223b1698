"""How much of a text a model gives away under teacher forcing, as torchmetrics metrics."""

from typing import Any

from torch import Tensor

from lightning_curvature._checks import check_share
from lightning_curvature.metrics._mean import MeanOverAll
from lightning_curvature.metrics.functional._shared import check_ignore_index
from lightning_curvature.metrics.functional.leakage import _extraction_strength_update, _min_k_probability_update


class ExtractionStrength(MeanOverAll):
    r"""Mean share of a text that a model completes from the rest of it.

    .. math:: (L - k) / L \quad \text{with the smallest } k \text{ such that } preds_{k:} = target_{k:}

    A sequence whose last token is wrong has strength 0 (some implementations give it 1 / L). Source: Carlini et al.
    2021, computed under teacher forcing as in Wang et al. 2024, arXiv:2406.09179.

    - ``update(preds, target)``: most likely token at each target position given the *true* tokens before it, and the
      true tokens, int64 ``[n, L]``; one length per call. ``ValueError`` if shapes or dtypes do not fit.
    - ``compute()``: a mean over sequences in [0, 1], float64 scalar; NaN before the first sequence.

    Example:
        >>> import torch
        >>> metric = ExtractionStrength()
        >>> metric.update(torch.tensor([[1, 9, 3, 4]]), torch.tensor([[1, 2, 3, 4]]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_upper_bound = 1.0

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._add(*_extraction_strength_update(preds, target))


class MinKProbability(MeanOverAll):
    r"""Mean log-probability of the least likely tokens of a text: higher looks more memorized.

    Of :math:`c` counted tokens of a sequence, the :math:`\lceil k c \rceil` least likely ones enter. Source: Shi et al.
    2024, arXiv:2310.16789.

    - ``update(logits, target)``: scores ``[n, L, V]``, any floating dtype, and token ids, int64 ``[n, L]``, shifted so
      that row ``i`` predicts ``target[:, i]``; the softmax runs in float32 at least. ``ValueError`` if shapes, dtypes
      or ids do not fit.
    - ``compute()``: a mean of at most 0 over the sequences with a counted position, float64 scalar; NaN before the
      first one. :func:`~lightning_curvature.metrics.functional.min_k_scores` gives the value of each sequence.

    Args:
        k: Share of the counted tokens that enters the mean, in (0, 1]; at least one token does.
        ignore_index: Id of the positions that do not count, for example padding.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``k`` is out of range or ``ignore_index`` is no integer.

    Example:
        >>> import torch
        >>> metric = MinKProbability(k=0.2)
        >>> metric.update(torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]]).log(), torch.tensor([[0, 1, 1]]))
        >>> metric.compute().exp()
        tensor(0.1000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = None
    plot_upper_bound = 0.0

    def __init__(self, k: float = 0.2, ignore_index: int = -100, **kwargs: Any) -> None:
        self.k = check_share(k, "k")
        self.ignore_index = check_ignore_index(ignore_index)
        super().__init__(arguments={"k": self.k, "ignore_index": self.ignore_index}, **kwargs)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._add(*_min_k_probability_update(logits, target, self.k, self.ignore_index))
