"""A control: coefficients are dropped in a random basis, which means nothing."""

import torch
from torch import Tensor

from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.editing.projection import Projection
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.basis import CurvatureBasis, project_weight
from lightning_curvature.factors.layer import LayerFactors


def random_orthogonal(dim: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64 ``[dim, dim]``."""
    normal = torch.randn(dim, dim, dtype=torch.float64, generator=generator, device=generator.device)
    basis: Tensor = torch.linalg.qr(normal)[0]
    return basis


class RandomBasisEditor(WeightEditor):
    """Keeps a random share of the coefficients of a weight in random orthonormal bases.

    No coefficient of such a basis matters more than another, so ``energy`` is the share of coefficients that are kept.

    Args:
        energy: Share of coefficients to keep, in (0, 1], or a dict as in :class:`CurvatureEditor`.
        layers: As in :class:`CurvatureEditor`.
        seed: Seed of the bases and of the choice; the global random state is not touched.
    """

    reads_factors = False
    method = "random"

    def __init__(
        self, energy: float | dict[str, float] = DEFAULT_ENERGY, layers: list[str] | None = None, seed: int = 0
    ) -> None:
        super().__init__(energy, layers)
        self.seed = seed

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return a weight with the share ``energy`` of its coefficients in random bases."""
        generator = torch.Generator().manual_seed(self.seed)
        U_G, U_A = (random_orthogonal(d, generator) for d in weight.shape)
        kept = max(round(energy * weight.numel()), 1)
        keep = torch.zeros(weight.numel(), dtype=torch.float64, device="cpu")
        keep[torch.randperm(weight.numel(), generator=generator, device="cpu")[:kept]] = 1.0
        basis = CurvatureBasis(U_G, torch.ones_like(U_G[0]), U_A, torch.ones_like(U_A[0]))
        edited = project_weight(weight.cpu(), basis, keep.view(weight.shape)).to(weight.device)
        return Projection(edited, kept, kept / weight.numel())
