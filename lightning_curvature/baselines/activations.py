"""The curvature edit without its gradient half."""

import torch
from torch import Tensor

from lightning_curvature.basis import CurvatureBasis, project_weight, select_staircase
from lightning_curvature.editor import Projection, WeightEditor
from lightning_curvature.factors import LayerFactors


class ActivationEditor(WeightEditor):
    """Keeps the directions of strong inputs: the K-FAC edit with ``G = I``.

    With G = I every row keeps the same columns, those of the leading eigenvectors of A: the edit is a projection of
    the layer's inputs, a control for what the gradients add. Arguments as :class:`CurvatureEditor`.
    """

    method = "activations"

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the part of a weight that reads the leading principal directions of its inputs."""
        _, _, U_A, mu = factors.basis
        ones = torch.ones(weight.shape[0], dtype=mu.dtype, device=mu.device)
        staircase = select_staircase(ones, mu, energy)
        basis = CurvatureBasis(torch.diag(ones), ones, U_A, mu)
        edited = project_weight(weight.to(mu.device), basis, staircase.columns).to(weight.device)
        return Projection(edited, staircase.kept, staircase.energy_kept)
