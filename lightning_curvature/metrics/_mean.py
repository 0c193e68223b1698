"""The base classes of all metrics: sums over everything seen, and means."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_curvature.metrics.functional._shared import compute_mean


class SummedMetric(Metric):
    """A metric whose states are sums over batches and ranks.

    A :class:`torchmetrics.MetricCollection` groups metrics whose states have the same names, and the same values after
    the first batch: it updates one of them, and gives its states to the others. To keep metrics of different meaning
    apart, each metric holds an empty state that is named after its class and its arguments.

    Args:
        arguments: The arguments by which metrics of this class differ, by name.
        kwargs: Passed on to :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound: float | None = 0.0

    def __init__(self, *, arguments: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        meaning = "_".join([type(self).__qualname__, *(f"{key}_{value}" for key, value in (arguments or {}).items())])
        self.add_state(meaning.replace(".", "_"), default=[], dist_reduce_fx=None)  # empty: no rank sends it

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot one or several values; see :meth:`torchmetrics.Metric.plot`."""
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Follow a module to its device, but not to its dtype: sums must stay exact in a ``torch.bfloat16`` module."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class MeanOverAll(SummedMetric):
    """A total and an int64 count, summed over batches and ranks; ``compute`` divides them."""

    total_dtype = torch.float64

    total: Tensor
    count: Tensor

    def __init__(self, *, arguments: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        super().__init__(arguments=arguments, **kwargs)
        self.add_state("total", default=torch.zeros((), dtype=self.total_dtype), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add(self, total: Tensor, count: Tensor) -> None:
        # Out of place: a state that was reset in inference mode cannot be changed in place outside it.
        self.total = self.total + total
        self.count = self.count + count

    def compute(self) -> Tensor:
        """Return the mean; NaN if nothing was counted."""
        return compute_mean(self.total, self.count)
