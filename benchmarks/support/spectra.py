"""Random factors with falling spectra."""

import torch
from torch import Tensor

from lightning_curvature import LayerFactors


def covariance(dim: int, seed: int = 0) -> Tensor:
    """Return a sample covariance with a falling spectrum in a random basis, float32 ``[dim, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(dim + dim // 2, dim, generator=generator)
    scales = torch.arange(1, dim + 1).float() ** -0.6
    moment = (rows.T @ rows / len(rows)) * torch.outer(scales, scales)
    signs = torch.randn(dim, generator=generator)
    signs /= signs.norm()
    moment -= 2 * torch.outer(signs, signs @ moment)  # a reflection on both sides, so that no axis is special
    moment -= 2 * torch.outer(moment @ signs, signs)
    return (moment + moment.T) / 2


def spectrum(dim: int, power: float) -> Tensor:
    """Return falling eigenvalues without ties, float64 ``[dim]``."""
    noise = torch.rand(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    return (torch.arange(1, dim + 1, dtype=torch.float64) + 0.5 * noise) ** -power


def random_layer(shape: tuple[int, int], device: str = "cpu") -> tuple[Tensor, LayerFactors]:
    """Return a random weight ``[d_out, d_in]`` and its factors."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02
    A, G = covariance(shape[1]).to(device), covariance(shape[0], 1).to(device)
    return weight.to(device), LayerFactors(A=A, G=G, num_inputs=9, num_gradients=9)
