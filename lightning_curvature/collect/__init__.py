"""From steps to factors: running sums, one pass over data, and the windows of a run that goes on."""

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.eigenvalues import correct_eigenvalues
from lightning_curvature.collect.passes import collect

__all__ = ["Collector", "collect", "correct_eigenvalues"]
