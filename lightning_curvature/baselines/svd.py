"""A control: low-rank truncation, which uses no data."""

import torch
from torch import Tensor

from lightning_curvature.editing.projection import Projection
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.layer import LayerFactors


class SVDEditor(WeightEditor):
    """Keeps the largest singular values of a weight until their squares hold the share ``energy`` of the total.

    Arguments as :class:`CurvatureEditor`; the factors only say which layers to edit.
    """

    reads_factors = False
    method = "svd"

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the best approximation of the smallest rank that keeps the share ``energy`` of the squared norm."""
        U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
        share = (S.square().cumsum(0) / S.square().sum()).nan_to_num(1.0)  # a weight of zeros loses nothing
        rank = min(int((share < energy * (1 - 1e-12)).sum()) + 1, len(S))
        edited = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        # A matrix of rank r has r (d_out + d_in - r) free coefficients.
        return Projection(edited.to(weight), rank * (sum(weight.shape) - rank), float(share[rank - 1]))
