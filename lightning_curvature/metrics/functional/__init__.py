"""Functional twins of the metrics."""

from lightning_curvature.metrics.functional.noisy_labels import noisy_label_accuracy

__all__ = ["noisy_label_accuracy"]
