"""Eigendecomposition of a factor, also of one with dead inputs, of few positions, or of very large or small numbers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_MODERATE = 200
"""Numbers between ``2**-200`` and ``2**200`` can be squared and multiplied, and are left as they are."""


class FaultyLayerError(ValueError):
    """A layer cannot be edited, because its weight or its factors are not what training leaves in them."""


class TooFewPositionsError(FaultyLayerError):
    """A layer is not edited, because its factors rest on too few positions for their rank."""


def decompose(factor: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return eigenvectors and eigenvalues of a symmetric positive semi-definite matrix, eigenvalues descending.

    Rows and columns of zeros, as dead inputs leave them, are not given to a solver: their directions are unit vectors
    of the eigenvalue zero, and come last. If a solver fails, others are tried.

    Args:
        factor: ``[d, d]``, any floating dtype; decomposed in float64 on its device, or on the CPU if that fails.
        what: Name for errors, such as ``"Factor A"``.

    Returns:
        Eigenvectors ``[d, d]`` (columns) and eigenvalues ``[d]``, float64; eigenvalues below the rounding error
        ``d * eps * largest`` are set to zero, and so are negative ones.

    Raises:
        FaultyLayerError: If the matrix is not finite, or its trace is zero or larger than a float64 can be.
    """
    if not bool(torch.isfinite(factor).all()):
        raise FaultyLayerError(f"{what} holds NaN or infinite values. Collect it again; a batch probably overflowed.")
    entries = factor != 0
    live = entries.any(0) | entries.any(1)
    del entries
    count = int(live.sum())
    matrix = factor.double() if count == len(factor) else factor[live][:, live].double()
    matrix, exponent = moderate(matrix)
    values, vectors = _solve(matrix, what) if count else (matrix.new_zeros(0), matrix)
    del matrix
    values, vectors = values.to(factor.device).flip(0), vectors.to(factor.device).flip(1)
    floor = values[:1] * len(factor) * torch.finfo(torch.float64).eps
    values = scaled(torch.where(values > floor, values, 0.0), -exponent)
    if not bool((values > 0).any()):
        raise FaultyLayerError(f"{what} is zero: no signal reached the layer, so its directions cannot be told apart.")
    if not bool(torch.isfinite(values).all()):
        raise FaultyLayerError(
            f"{what} has an eigenvalue that is too large for a float64. Collect it at another scale."
        )
    if count == len(factor):
        return vectors, values
    whole = torch.zeros(factor.shape, dtype=vectors.dtype, device=vectors.device)
    whole[live, :count] = vectors
    whole[~live, torch.arange(count, len(factor), device=whole.device)] = 1.0
    return whole, torch.cat([values, values.new_zeros(len(factor) - count)])


def moderate(values: Tensor) -> tuple[Tensor, int]:
    """Return numbers times a power of two, and its exponent, so that their squares and products do not overflow.

    Numbers of ordinary size stay as they are, with the exponent 0.

    >>> moderate(torch.tensor([3e-300, 1.5], dtype=torch.float64))[1]
    0
    >>> moderate(torch.tensor([3e-300, 0.0], dtype=torch.float64))[0]
    tensor([0.5023, 0.0000], dtype=torch.float64)
    """
    largest = max(map(abs, torch.stack(values.aminmax()).tolist())) if values.numel() else 0.0
    exponent = math.frexp(largest)[1]
    if abs(exponent) <= _MODERATE:
        return values, 0
    return scaled(values, -exponent), -exponent


def scaled(values: Tensor, exponent: int) -> Tensor:
    """Return numbers times ``2**exponent``, in two steps, since ``2**exponent`` may be too small for a float64."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half) if exponent else values


def _solve(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a float64 matrix, of which the lower half is read."""
    ways: list[tuple[Callable[[Tensor], tuple[Tensor, Tensor]], torch.device]] = [
        (torch.linalg.eigh, matrix.device),
        (torch.linalg.eigh, torch.device("cpu")),
        (_eigh_of_reflection, torch.device("cpu")),
        (_svd, torch.device("cpu")),
    ]
    reason = ""
    for way, device in ways:
        try:
            values, vectors = way(matrix.to(device))
        except torch.cuda.OutOfMemoryError:
            raise  # it says nothing of the factor
        except RuntimeError as error:
            reason = reason or str(error)
            continue
        if bool(torch.isfinite(values).all()) and _orthonormal(vectors):
            return values, vectors
        reason = reason or "The solver returned vectors that are not orthonormal."
    raise FaultyLayerError(
        f"{what} could not be decomposed, neither on {matrix.device} nor on the CPU: {reason} Collect it again, or "
        "leave the layer out (skip_faulty=True edits the others)."
    )


def _eigh_of_reflection(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose ``H M H`` with a reflection ``H``: the same eigenvalues, but none of the zeros that solvers fail on."""
    normal = _random_vector(len(matrix))
    normal /= torch.linalg.vector_norm(normal)
    reflected = _symmetric(matrix)
    product = reflected @ normal
    product -= (normal @ product) * normal
    reflected.addr_(normal, product, alpha=-2.0).addr_(product, normal, alpha=-2.0)
    values, vectors = torch.linalg.eigh(reflected)
    return values, vectors.addr_(normal, normal @ vectors, alpha=-2.0)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose by singular vectors; they are the eigenvectors if no eigenvalue is below zero."""
    left, values, right = torch.linalg.svd(_symmetric(matrix))
    values, order = (values * (left * right.mT).sum(0)).sort()
    return values, left[:, order]


def _orthonormal(vectors: Tensor) -> bool:
    """Tell whether the columns of a square matrix are orthonormal: they must turn a random vector, and turn it back.

    Solvers have returned NaN without an error, and vectors of close eigenvalues with an angle of 1e-11.
    """
    vector = _random_vector(len(vectors)).to(vectors.device)
    error = float((vectors.mT @ (vectors @ vector) - vector).abs().max())
    return error <= 8 * (len(vectors) + 8) * torch.finfo(torch.float64).eps


def _random_vector(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(length, dtype=torch.float64, generator=generator, device="cpu")


def _symmetric(matrix: Tensor) -> Tensor:
    """Return a copy with the lower half on both sides, as ``eigh`` reads it."""
    return matrix.tril() + matrix.tril(-1).mT
