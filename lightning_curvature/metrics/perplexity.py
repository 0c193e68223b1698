"""Perplexity of next-token predictions, as a torchmetrics metric."""

from typing import Any

from torch import Tensor

from lightning_curvature.metrics._mean import MeanOverAll
from lightning_curvature.metrics.functional._shared import check_ignore_index
from lightning_curvature.metrics.functional.perplexity import _perplexity_compute, _perplexity_update


class Perplexity(MeanOverAll):
    """Exponential of the mean negative log-likelihood of all counted tokens.

    Every token weighs the same, whatever its batch. Nothing is shifted: ``logits[..., i, :]`` must predict
    ``target[..., i]``. For a causal model pass ``logits[:, :-1]`` and ``tokens[:, 1:]``.

    - ``update(logits, target)``: scores ``[..., V]``, any floating dtype, and token ids, int64 ``[...]``.
      ``ValueError`` if shapes, dtypes or ids do not fit.
    - ``compute()``: a value of at least 1, float64 scalar; NaN before the first counted token.

    The softmax runs in float32 at least, log-likelihoods are summed in float64 and tokens counted in int64.
    ``torchmetrics.text.Perplexity`` (1.9) takes the logarithm of a softmax in the dtype of the logits and sums a batch
    in it, so that with float16 logits one very unlikely token, or one long batch, gives infinity; its float32 count no
    longer grows by single tokens beyond ``2**24``.

    Args:
        ignore_index: Id of the positions that do not count, for example padding.
        kwargs: Passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``ignore_index`` is no integer.

    Example:
        >>> import torch
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, -100]]))
        >>> metric.compute()
        tensor(5.0000, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = 1.0

    def __init__(self, ignore_index: int = -100, **kwargs: Any) -> None:
        self.ignore_index = check_ignore_index(ignore_index)
        super().__init__(arguments={"ignore_index": self.ignore_index}, **kwargs)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch."""
        self._add(*_perplexity_update(logits, target, self.ignore_index))

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return _perplexity_compute(self.total, self.count)
