"""Metrics of what was forgotten and what was kept: torchmetrics classes with functional twins."""

from lightning_curvature.metrics.noisy_labels import NoisyLabelAccuracy

__all__ = ["NoisyLabelAccuracy"]
