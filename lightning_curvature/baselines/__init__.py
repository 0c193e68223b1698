"""Controls and rivals of the curvature edit, with the same interface, so that they are compared fairly."""

from lightning_curvature.baselines.random_basis import RandomBasisEditor
from lightning_curvature.baselines.svd import SVDEditor

__all__ = ["RandomBasisEditor", "SVDEditor"]
