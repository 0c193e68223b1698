r"""The curvature basis: selection of coefficients, projection. Pure functions on tensors.

With ``G = U_G diag(lam) U_G^T`` and ``A = U_A diag(mu) U_A^T`` the K-FAC curvature of the direction ``u_i v_j^T`` is
the product ``lam_i mu_j``, the *mass* of the pair (i, j). Both spectra are sorted, so the pairs above a threshold form
a staircase: row i keeps a prefix of ``k_i`` columns, and ``k_i`` does not increase. One number, the threshold, decides
the whole selection, and it is found by bisection without forming the ``d_out x d_in`` products.

Source: arXiv:2510.24256, sections 3 and 5.
"""

import math
import struct
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_curvature._checks import check_energy
from lightning_curvature.factors.decomposition import FaultyLayerError, decompose, moderate

TIE = 1e-9
"""Relative difference below which two masses count as equal (an eigensolver splits equal eigenvalues by rounding)."""


class CurvatureBasis(NamedTuple):
    """Eigenvectors (columns) and eigenvalues (descending, none negative) of ``G`` and ``A``, all float64."""

    U_G: Tensor
    lam: Tensor
    U_A: Tensor
    mu: Tensor


class Staircase(NamedTuple):
    """Selected pairs: row i keeps its first ``columns[i]`` columns (int64 ``[d_out]``)."""

    columns: Tensor
    energy_kept: float

    @property
    def kept(self) -> int:
        """Number of kept pairs."""
        return int(self.columns.sum())


def curvature_basis(A: Tensor, G: Tensor) -> CurvatureBasis:
    """Return the curvature basis of a layer from its factors ``A: [d_in, d_in]`` and ``G: [d_out, d_out]``."""
    U_G, lam = decompose(G, "Factor G")
    U_A, mu = decompose(A, "Factor A")
    return CurvatureBasis(U_G, lam, U_A, mu)


def select_staircase(lam: Tensor, mu: Tensor, energy: float) -> Staircase:
    """Select the pairs of largest mass ``lam_i * mu_j`` until they hold the share ``energy`` of the total.

    Pairs tied with the last selected one are selected too, so that the result does not depend on the basis chosen
    inside an eigenspace. Pairs of zero mass are selected only at ``energy=1.0``.

    Args:
        lam: Eigenvalues of G, ``[d_out]``, descending, not negative.
        mu: Eigenvalues of A, ``[d_in]``, descending, not negative.
        energy: Share of the total mass ``lam.sum() * mu.sum()`` to keep, in (0, 1].

    Returns:
        The kept columns of each row, and the share that was reached.

    Raises:
        FaultyLayerError: If a spectrum is not finite, or all of it is zero.

    Example:
        >>> lam, mu = torch.tensor([2.0, 1.0]), torch.tensor([3.0, 1.0, 0.0])
        >>> select_staircase(lam, mu, 0.7)
        Staircase(columns=tensor([1, 1]), energy_kept=0.75)
    """
    energy = check_energy(energy)
    if energy == 1.0:
        return Staircase(torch.full_like(lam, len(mu), dtype=torch.int64), 1.0)
    # Many steps on short arrays: NumPy starts each several times faster than torch, and a GPU would be waited for.
    # Neither spectrum's scale matters, and their products must be numbers.
    rows, cols = (moderate(values.double().cpu())[0].numpy() for values in (lam, mu))
    sums = np.concatenate([[0.0], cols.cumsum()])
    total = _check_total(float(rows.sum() * cols.sum()))
    wanted = energy * total * (1 - 1e-12)

    def kept(threshold: float) -> tuple[NDArray[np.int64], float]:
        columns = _columns_above(rows, cols, threshold)
        return columns, float((rows * sums[columns]).sum())

    # Positive doubles are ordered like their bit patterns: bisect those, and the largest threshold that keeps enough
    # is found exactly, in at most 63 steps.
    low, high = 1, _bits(float(rows[0] * cols[0]))
    while low < high:
        middle = (low + high + 1) // 2
        if kept(_float(middle))[1] >= wanted:
            low = middle
        else:
            high = middle - 1
    columns, mass = kept(_float(low) * (1 - TIE))
    return Staircase(torch.from_numpy(columns).to(lam.device), mass / total)


def select_largest(scores: Tensor, energy: float) -> tuple[Tensor, float]:
    """Select the entries of the largest scores until they hold the share ``energy`` of the total.

    Entries tied with the last selected one are selected too; those of zero score are not.

    Args:
        scores: ``[d_out, d_in]``, none negative.
        energy: Share of their sum to keep, in (0, 1).

    Returns:
        Which entries are kept, bool ``[d_out, d_in]``, and the share that was reached.

    Raises:
        FaultyLayerError: If the scores are not finite, or all of them are zero.

    Example:
        >>> select_largest(torch.tensor([[3.0, 1.0], [0.0, 4.0]]), 0.8)
        (tensor([[ True, False],
                [False,  True]]), 0.875)
    """
    scores = moderate(scores.double())[0]
    ordered = scores.flatten().sort(descending=True).values
    sums = ordered.cpu().cumsum(0)  # whose rounding differs from run to run on a GPU
    total = _check_total(float(sums[-1]))
    last = min(int((sums < energy * total * (1 - 1e-12)).sum()), len(ordered) - 1)
    keep = (scores >= ordered[last] * (1 - TIE)) & (scores > 0)
    return keep, float(scores[keep].sum()) / total


def shrink(scores: Tensor, energy: float) -> tuple[Tensor, float]:
    """Return factors ``s / (s + t)`` that shrink entries smoothly, and the share of the scores that they keep.

    The threshold ``t`` is such that ``sum(s * factor)`` is the share ``energy`` of ``sum(s)``.

    Args:
        scores: ``[d_out, d_in]``, none negative.
        energy: Share to keep, in (0, 1).

    Raises:
        FaultyLayerError: If the scores are not finite, or all of them are zero.

    Example:
        >>> factors, kept = shrink(torch.tensor([[4.0, 4.0]]), 0.8)
        >>> [round(float(factor), 6) for factor in factors[0]], round(kept, 6)
        ([0.8, 0.8], 0.8)
    """
    scores = moderate(scores.double())[0]
    total = _check_total(float(scores.sum()))

    def kept(logarithm: float) -> tuple[Tensor, float]:
        factors = scores / (scores + math.exp(logarithm))
        return factors, float((scores * factors).sum()) / total

    largest = math.log(float(scores.max()))
    low, high = largest - 60, largest + 60
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle)[1] > energy else (low, middle)
    return kept(high)


def _check_total(total: float) -> float:
    if not 0.0 < total < math.inf:
        raise FaultyLayerError(
            "The scores of the coefficients are zero or not finite, so none can be told from another."
        )
    return total


def _columns_above(lam: NDArray[np.float64], mu: NDArray[np.float64], threshold: float) -> NDArray[np.int64]:
    """For each i, count the j with ``lam_i * mu_j >= threshold``."""
    ascending = mu[::-1]
    with np.errstate(divide="ignore", over="ignore"):  # above every mu_j where lam_i is zero
        columns = len(mu) - np.searchsorted(ascending, threshold / lam)
    while True:  # a quotient is rounded: the products decide, for all equal ones at once
        after, last = np.minimum(columns, len(mu) - 1), np.maximum(columns - 1, 0)
        more = (columns < len(mu)) & (lam * mu[after] >= threshold)
        fewer = (columns > 0) & (lam * mu[last] < threshold)
        if not (more | fewer).any():
            return columns
        added = len(mu) - np.searchsorted(ascending, mu[after])
        left = len(mu) - np.searchsorted(ascending, mu[last], side="right")
        columns = np.where(more, added, np.where(fewer, left, columns))


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def coefficients(weight: Tensor, basis: CurvatureBasis) -> Tensor:
    r"""Return ``C = U_G^T W U_A``, float64 ``[d_out, d_in]``."""
    return basis.U_G.T @ weight.to(basis.U_G) @ basis.U_A


def project_weight(weight: Tensor, basis: CurvatureBasis, keep: Tensor, known: Tensor | None = None) -> Tensor:
    r"""Keep the selected coefficients of a weight in the curvature basis.

    .. math:: W' = U_G \left(K \odot (U_G^\top W U_A)\right) U_A^\top

    Source: arXiv:2510.24256, section 5.

    Args:
        weight: Layer weight, ``[d_out, d_in]``, any floating dtype.
        basis: Orthonormal ``U_G`` ``[d_out, d_out]`` and ``U_A`` ``[d_in, d_in]``.
        keep: Factor of each coefficient, ``[d_out, d_in]``, or kept columns per row, int64 ``[d_out]``, not increasing.
        known: The coefficients of the weight, ``[d_out, d_in]``, if they are there already.

    Returns:
        A new tensor with the shape, dtype and device of ``weight``.

    Raises:
        ValueError: If a shape disagrees.
    """
    shape = (basis.U_G.shape[0], basis.U_A.shape[0])
    if tuple(weight.shape) != shape or tuple(keep.shape) not in (shape, shape[:1]):
        raise ValueError(
            f"The basis is for a weight {list(shape)}; found weight {list(weight.shape)}, keep {list(keep.shape)}."
        )
    if keep.dim() == 1:
        # Nothing outside of the staircase's bounding box is computed.
        rows, columns = int((keep > 0).sum()), int(keep.max())
        basis = basis._replace(U_G=basis.U_G[:, :rows], U_A=basis.U_A[:, :columns])
        keep = torch.arange(columns, device=keep.device) < keep[:rows, None]
        known = None if known is None else known[:rows, :columns]
    kept = (coefficients(weight, basis) if known is None else known) * keep
    return (basis.U_G @ kept @ basis.U_A.T).to(weight)
