"""Controls and rivals of the curvature edit, with the same interface, so that they are compared fairly."""

from lightning_curvature.baselines.interpolation import InterpolationEditor
from lightning_curvature.baselines.random_basis import RandomBasisEditor
from lightning_curvature.baselines.svd import SVDEditor
from lightning_curvature.baselines.trained import BalancedSubnet, GradientAscent, NegativePreference

__all__ = [
    "BalancedSubnet",
    "GradientAscent",
    "InterpolationEditor",
    "NegativePreference",
    "RandomBasisEditor",
    "SVDEditor",
]
