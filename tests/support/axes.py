"""Factors whose eigenvectors are the axes, and examples along axes."""

import torch
import torch.nn.functional as F

from lightning_curvature import LayerFactors


def diagonal(mu, lam=(1.0,)):
    """Factors whose eigenvectors are the axes, in this order."""
    A, G = (torch.diag(torch.tensor(values, dtype=torch.float64)) for values in (mu, lam))
    return LayerFactors(A=A, G=G, num_inputs=10, num_gradients=10)


def axis(*places, dim=20, times=1.0):
    """Examples of one position, each along an axis."""
    return times * F.one_hot(torch.tensor(places), dim).double()[:, None]


def mixture(weights, count=40, seed=0):
    """Examples with the given strength in each band, times a random size of their own."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 + 0.2 * torch.rand(count, 1, 1, generator=generator, dtype=torch.float64)
    return sizes * sum(w * axis(place) for w, place in zip(weights, (0, 3, 8, 15), strict=True))
