"""The result of an edit of one weight matrix, where it is computed, and how far it lies from the old matrix."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_curvature.editing.cost import LayerCost
from lightning_curvature.factors.decomposition import moderate, scaled
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.memory import place_edit

T = TypeVar("T")


@dataclass(frozen=True)
class Projection:
    """A new weight matrix, and how much of the old one it keeps.

    Args:
        weight: The new matrix, ``[d_out, d_in]``.
        kept: Number of kept coefficients.
        energy_kept: Kept share of the method's mass, in [0, 1].
        cost: What the change costs; None if it was not asked.
        change: Change of each coefficient, float64 ``[d_out, d_in]``, where it is known.
    """

    weight: Tensor
    kept: int
    energy_kept: float
    cost: LayerCost | None = None
    change: Tensor | None = None


def project_on_free_device(
    name: str, matrix: Tensor, factors: LayerFactors, project: Callable[[Tensor, LayerFactors], T]
) -> T:
    """Project on the weight's GPU if there is room, otherwise where the factors are.

    If the GPU runs out of memory all the same, a warning says so and the CPU takes over.

    Args:
        name: Layer, for the warning.
        matrix: Weight, ``[d_out, d_in]``.
        factors: Its factors.
        project: Returns the projection of a matrix, given factors on the device to compute on.
    """
    place = place_edit(matrix.device, factors.A.device, factors.shape)
    if place != factors.A.device:
        try:
            return project(matrix, factors.to(place))
        except torch.cuda.OutOfMemoryError:
            warnings.warn(f"Layer {name!r} does not fit on {place}, so it is edited on the CPU.", stacklevel=2)
    # Outside of the handler: the error there keeps the tensors of the failed attempt alive.
    return project(matrix, factors)


def relative_change(new: Tensor, old: Tensor) -> float:
    """Return ``||new - old|| / ||old||`` (Frobenius); 0 if both are zeros."""
    old, exponent = moderate(old.double())
    change = torch.linalg.vector_norm(scaled(new.double(), exponent) - old)
    return float((change / torch.linalg.vector_norm(old)).nan_to_num())


def share_kept(new: Tensor, old: Tensor) -> float:
    """Return ``||new|| / ||old||`` (Frobenius), the share of a matrix that is kept; 1 if it is all zeros."""
    old, exponent = moderate(old.double())
    kept = torch.linalg.vector_norm(scaled(new.double(), exponent)) / torch.linalg.vector_norm(old)
    return float(kept.nan_to_num(1.0))
