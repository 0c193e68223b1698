"""Whether a network holds trained weights, told by the spectra of its matrices.

An initialization draws the entries of a matrix independently, so its largest singular value lies at the edge of the
Marchenko-Pastur distribution, ``s (sqrt(m) + sqrt(n))`` for m x n entries of root mean square s, or below it
(orthogonal matrices). Training adds directions that stand out from this bulk (Martin and Mahoney 2021,
arXiv:1810.01075). The initializations of torchvision's and transformers' models have 0.85 to 0.99 times the edge; half
of the matrices of SmolLM2-135M have more than 1.65 times.
"""

import math
from typing import TypeGuard

import torch
from torch import Tensor, nn

EDGE = 1.1
"""A matrix with a larger singular value, as a multiple of the edge, is trained."""
STEPS = 8
"""Steps of the power iteration; too few give a smaller value, never a larger one."""
SMALLEST = 16
"""Matrices of fewer rows or columns say little."""


def has_trained_weights(module: nn.Module) -> bool:
    """Tell whether at least half of the entries of a network's matrices lie in matrices that look trained.

    Sharded, quantized and lazy weights tell nothing; neither do those of embeddings, whose rows may be sparse.

    >>> has_trained_weights(nn.Linear(64, 64))
    False
    """
    trained = entries = 0
    for child in module.modules():
        weight = None if isinstance(child, (nn.Embedding, nn.EmbeddingBag)) else child._parameters.get("weight")
        if not _is_matrix(weight):
            continue
        ratio = _edge_ratio(weight.detach().flatten(1))
        if ratio is not None:
            entries += weight.numel()
            trained += weight.numel() * (ratio > EDGE)
    return 2 * trained > entries


def _is_matrix(weight: object) -> TypeGuard[nn.Parameter]:
    return (
        isinstance(weight, nn.Parameter)
        and not isinstance(weight, nn.parameter.UninitializedParameter)
        and not hasattr(weight, "full_tensor")
        and weight.device.type != "meta"
        and weight.is_floating_point()
        and weight.ndim >= 2
        and min(len(weight), weight.numel() // max(len(weight), 1)) >= SMALLEST
    )


def _edge_ratio(weight: Tensor) -> float | None:
    """Return the largest singular value of a matrix as a multiple of the edge; None of a matrix of zeros."""
    weight = weight.float()
    weight = weight - weight.mean()  # of an initialization with positive entries alone
    d_out, d_in = weight.shape
    scale = float(weight.norm())
    if not 0 < scale < math.inf:
        return None
    direction = torch.randn(d_in, generator=torch.Generator().manual_seed(0)).to(weight.device)
    value = 0.0
    for _ in range(STEPS):
        image = weight @ (direction / direction.norm())
        direction = weight.T @ (image / image.norm())
        value = float(direction.norm())
    return value * math.sqrt(d_out * d_in) / (scale * (math.sqrt(d_out) + math.sqrt(d_in)))
