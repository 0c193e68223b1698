"""Random factors."""

import torch

from lightning_curvature import LayerFactors


def random_factors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, g = torch.randn(40, 6, generator=generator).double(), torch.randn(40, 5, generator=generator).double()
    return LayerFactors(
        A=x.T @ x / 40,
        G=g.T @ g / 40,
        num_inputs=40,
        num_gradients=40,
        A_coupled=x.T @ x / 30,
        G_coupled=g.T @ g / 30,
        eigenvalues=torch.rand(5, 6, generator=generator).double(),
    )


def layer(seed=0, d_in=3, d_out=2, n=10, **extra):
    torch.manual_seed(seed)
    a, g = torch.randn(n, d_in), torch.randn(n, d_out)
    return LayerFactors(A=a.T @ a / n, G=g.T @ g / n, num_inputs=n, num_gradients=n, **extra)
