r"""Updates of low rank, ``D = s B A``: their edit, and the matrix of their rank that is nearest to it.

The edit ``P(D)`` of an update may have a higher rank than the update. What is stored is the matrix ``X`` of the rank of
the update that is nearest to ``P(D)``, in the norm of the predicted loss:

.. math:: \min_{\mathrm{rank}(X) \le r} \| G^{1/2} (P(D) - X) A^{1/2} \|_F

A singular value decomposition of ``G^{1/2} P(D) A^{1/2}`` solves it. Without factors the norm is Frobenius's.

Source: Hu et al. 2021, arXiv:2106.09685 (LoRA); Eckart and Young 1936 (the nearest matrix).
"""

import dataclasses
import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_curvature.editing.cost import price
from lightning_curvature.editing.projection import project_on_free_device, relative_change, share_kept
from lightning_curvature.editing.report import LayerEdit
from lightning_curvature.factors.basis import coefficients
from lightning_curvature.factors.decomposition import FaultyLayerError
from lightning_curvature.factors.layer import LayerFactors

FLOOR = 1e-2
"""Share of the largest eigenvalue below which a direction counts as if it had that share.

Errors in flat directions cost next to nothing. Without a floor the nearest matrix would put into them what the edit
took out of them.
"""


class LowRank(NamedTuple):
    """An update of low rank, ``scaling * B @ A``.

    Args:
        A: ``[r, d_in]``.
        B: ``[d_out, r]``.
        scaling: A number.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def product(self) -> Tensor:
        """Return the update, float64 ``[d_out, d_in]``."""
        return self.scaling * (self.B.double() @ self.A.double())


class UpdateEditor(Protocol):
    """What the edit of an update of low rank needs of an editor; a ``WeightEditor`` is one."""

    reads_factors: bool

    def edit_weight(
        self, name: str, weight: Tensor, factors: LayerFactors, energy: float, transposed: bool
    ) -> tuple[Tensor, LayerEdit]:
        """Return a new weight, and the report of its edit."""


def edit_update(
    editor: UpdateEditor, name: str, update: LowRank, factors: LayerFactors, energy: float
) -> tuple[LowRank, LayerEdit]:
    """Return the edited update, of the rank and the dtypes of the old one, and the report of its edit.

    Args:
        editor: Edits it.
        name: Layer, for errors.
        update: The update.
        factors: Factors of the layer that it belongs to.
        energy: Share to keep, in (0, 1].

    Raises:
        ValueError: As :meth:`~lightning_curvature.editing.weight_editor.WeightEditor.edit_weight`.
    """
    old = update.product()
    wanted, edit = editor.edit_weight(name, old, factors, energy, False)
    edit = dataclasses.replace(edit, update_kept=share_kept(wanted, old), rank_loss=0.0)
    if torch.equal(wanted, old):
        return update, edit

    def fit(matrix: Tensor, factors: LayerFactors) -> tuple[LowRank, LayerEdit]:
        B, A = nearest(matrix, len(update.A), factors if editor.reads_factors else None)
        root = math.sqrt(abs(update.scaling))
        new = LowRank((A / root).to(update.A), (B * root / update.scaling).to(update.B), update.scaling)
        made = new.product()
        if not bool(torch.isfinite(made).all()):
            raise FaultyLayerError(f"Layer {name!r}: its edited adapter is too large for {update.A.dtype}.")
        cost = price(made - old, factors, editor.reads_factors)
        return new, dataclasses.replace(
            edit,
            relative_change=relative_change(made, old),
            changed=int((made != old).sum()),
            predicted_loss=cost.nats,
            costliest=cost.pair,
            update_kept=share_kept(made, old),
            rank_loss=relative_change(made, matrix) ** 2,
        )

    return project_on_free_device(name, wanted, factors, fit)


def nearest(matrix: Tensor, rank: int, factors: LayerFactors | None = None) -> tuple[Tensor, Tensor]:
    """Return the matrix of a rank that is nearest to a matrix, as two matrices of equal norms.

    Args:
        matrix: ``[d_out, d_in]``, float64.
        rank: The rank.
        factors: Factors whose predicted loss is the norm; None for the Frobenius norm.

    Returns:
        ``B: [d_out, rank]`` and ``A: [rank, d_in]``, whose product it is; float64, on the device of ``matrix``.

    Example:
        >>> B, A = nearest(torch.diag(torch.tensor([2.0, 1.0]).double()), 1)
        >>> (B @ A).round(decimals=6)
        tensor([[2., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    if factors is None:
        return _truncated(matrix, rank)
    U_G, lam, U_A, mu = factors.basis
    rows, columns = (values.clamp(min=FLOOR * float(values.max())).sqrt() for values in (lam, mu))
    left, right = _truncated(rows[:, None] * coefficients(matrix, factors.basis) * columns, rank)
    # The norms of the two are balanced anew, by a decomposition of a small matrix.
    Q_left, R_left = torch.linalg.qr(U_G @ (left / rows[:, None]))
    Q_right, R_right = torch.linalg.qr(U_A @ (right / columns).T)
    B, A = _truncated(R_left @ R_right.T, rank)
    return (Q_left @ B).to(matrix), (A @ Q_right.T).to(matrix)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the first singular vectors of a matrix, each times the root of its singular value; zeros fill the rank."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = S[:rank].sqrt()
    B, A = U[:, :rank] * root, root[:, None] * Vh[:rank]
    missing = rank - len(root)
    return torch.nn.functional.pad(B, (0, missing)), torch.nn.functional.pad(A, (0, 0, 0, missing))
