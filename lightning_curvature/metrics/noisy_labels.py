"""Memorized and recovered rates under label noise, as a torchmetrics metric."""

from typing import Any

import torch
from torch import Tensor

from lightning_curvature.metrics._mean import SummedMetric
from lightning_curvature.metrics.functional.noisy_labels import (
    _noisy_label_accuracy_compute,
    _noisy_label_accuracy_update,
)


class NoisyLabelAccuracy(SummedMetric):
    """Shares of the noised labels that are predicted as noised (memorized) and as their true label (recovered).

    Only examples with ``noised != clean`` count. Source: arXiv:2510.24256, section 5.

    - ``update(logits, noised, clean)``: logits ``[n, k]``, trained and true labels, int64 ``[n]``.
    - ``compute()``: ``{"memorized": ..., "recovered": ...}``, fractions in [0, 1]; NaN before a noised example.

    Example:
        >>> metric = NoisyLabelAccuracy()
        >>> metric.update(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 0]), torch.tensor([1, 1]))
        >>> metric.compute()
        {'memorized': tensor(0.5000), 'recovered': tensor(0.5000)}
    """

    higher_is_better = None
    plot_upper_bound = 1.0

    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", default=torch.zeros(3, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, noised: Tensor, clean: Tensor) -> None:
        """Add a batch."""
        self.counts = self.counts + _noisy_label_accuracy_update(logits, noised, clean)

    def compute(self) -> dict[str, Tensor]:
        """Return both rates."""
        return _noisy_label_accuracy_compute(self.counts)
