"""K-FAC factors of one layer."""

import dataclasses
import hashlib
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.factors.basis import CurvatureBasis
from lightning_curvature.factors.basis_cache import BASES
from lightning_curvature.factors.decomposition import moderate
from lightning_curvature.factors.fingerprints import Fingerprint

OPTIONAL = ("A_coupled", "G_coupled", "eigenvalues", "margins")
"""Tensors of :class:`LayerFactors` that may be missing."""
COUNTS = ("num_inputs", "num_gradients", "num_seen", "num_losses")
ERRORS = ("A_error", "G_error")
"""Numbers of :class:`LayerFactors` that may be missing."""
_REST = 1e-3
"""Largest part of the trace, beyond as many eigenvalues as there are positions, that counts as rounding."""


@dataclasses.dataclass(frozen=True, eq=False)
class LayerFactors:
    """K-FAC factors of one layer: normalised second moments and the counts behind them.

    Args:
        A: ``E[a a^T]`` of the layer's inputs, ``[d_in, d_in]``, floating.
        G: ``E[g g^T]`` of the gradients of the summed loss with respect to its outputs, ``[d_out, d_out]``, floating.
        num_inputs: Positions behind ``A``.
        num_gradients: Positions behind ``G`` (positions, not draws).
        num_seen: Positions that went through the layer, counted or not; by default ``num_inputs``.
        num_losses: Loss positions (rows of logits with a target) behind ``G``; by default ``num_gradients``. Where only
            a share of the layer's positions was used, that share of them.
        transposed: Whether the layer stores its weight as ``[d_in, d_out]`` (transformers ``Conv1D``).
        A_coupled: ``E[|g|^2 a a^T]``, ``[d_in, d_in]``, for the score ``"coupled"``.
        G_coupled: ``E[|a|^2 g g^T]``, ``[d_out, d_out]``, for the score ``"coupled"``.
        eigenvalues: ``E[(u_i^T g)^2 (v_j^T a)^2]`` in the curvature basis, ``[d_out, d_in]``, for ``"ekfac"``.
        margins: Gradient of the summed logit margins of recited sequences with respect to the weight,
            ``[d_out, d_in]``, for :class:`lightning_curvature.editing.bulk.BulkStepEditor`.
        A_error: Standard error of ``A``, relative to its Frobenius norm, from the spread of the batches; None if it is
            not known.
        G_error: The same of ``G``.
        weight: Which weight they were collected on, see :mod:`lightning_curvature.factors.fingerprints`; None if it is
            not known, or moved meanwhile.

    Attributes:
        copied_from: The factors that these are a copy of on another device, see :meth:`to`; None if they are no copy.

    Raises:
        ValueError: If a factor is not a square floating matrix, an optional one does not have its shape, or a count is
            negative.
    """

    A: Tensor
    G: Tensor
    num_inputs: int
    num_gradients: int
    num_seen: int = -1
    transposed: bool = False
    A_coupled: Tensor | None = None
    G_coupled: Tensor | None = None
    eigenvalues: Tensor | None = None
    margins: Tensor | None = None
    A_error: float | None = None
    G_error: float | None = None
    weight: Fingerprint | None = None
    num_losses: int = -1
    copied_from: "LayerFactors | None" = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("G", self.G)):
            if factor.dim() != 2 or factor.shape[0] != factor.shape[1] or not factor.is_floating_point():
                raise ValueError(
                    f"Factor {name} must be a square floating matrix, found {list(factor.shape)} {factor.dtype}."
                )
        if self.num_inputs < 0 or self.num_gradients < 0:
            raise ValueError(f"Counts must not be negative, found {self.num_inputs} and {self.num_gradients}.")
        shapes = {
            "A_coupled": self.A.shape,
            "G_coupled": self.G.shape,
            "eigenvalues": self.shape,
            "margins": self.shape,
        }
        for name, shape in shapes.items():
            extra = getattr(self, name)
            if extra is not None and tuple(extra.shape) != tuple(shape):
                raise ValueError(f"{name} must have the shape {list(shape)}, found {list(extra.shape)}.")
        if self.num_seen < 0:
            object.__setattr__(self, "num_seen", self.num_inputs)
        if self.num_losses < 0:
            object.__setattr__(self, "num_losses", self.num_gradients)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of the weight matrix that these factors describe."""
        return self.G.shape[0], self.A.shape[0]

    @property
    def positions_per_loss(self) -> float:
        """Positions of the layer that serve one loss position, on average; never below 1.

        About 1 for a language model, and the number of patches for a layer of a ViT, which has one label for an image.
        """
        return max(1.0, self.num_gradients / max(self.num_losses, 1))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are there, by name."""
        tensors = {name: getattr(self, name) for name in ("A", "G", *OPTIONAL)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def numbers(self) -> dict[str, int]:
        """The counts, and whether the weight is transposed, by name."""
        return {name: getattr(self, name) for name in (*COUNTS, "transposed")}

    @property
    def errors(self) -> dict[str, float]:
        """The standard errors that are known, by name."""
        return {name: error for name in ERRORS if (error := getattr(self, name)) is not None}

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but tensors that is known, by name, as JSON values."""
        return {**self.numbers, **self.errors, **({} if self.weight is None else {"weight": dict(self.weight)})}

    def digest(self) -> str:
        """Return a SHA-256 over the positions behind A and G and the tensors; the other counts do not change it."""
        digest = hashlib.sha256(f"{self.num_inputs}\0{self.num_gradients}\0{self.shape}\0".encode())
        for name, tensor in self.tensors.items():
            digest.update(f"{name}\0".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def basis(self) -> CurvatureBasis:
        """The curvature basis; each factor is decomposed once, and its eigenvectors are kept as long as it is."""
        return BASES.basis(self.A, self.G)

    def too_few_positions(self) -> str | None:
        """Return a sentence that says that a factor rests on too few positions for its rank; None if none does.

        A moment of n positions has rank n at most. Where n is less than the number of live inputs (outputs), the moment
        says nothing about the other directions, and an edit would remove them. Dead inputs, whose diagonal is zero, do
        not count. Neither do factors of a higher rank than their count allows, such as those made by hand. Only a
        factor of fewer positions than live inputs is decomposed.

        Raises:
            FaultyLayerError: If a factor that is decomposed cannot be.
        """
        for name, side, factor, count in (
            ("A", "inputs", self.A, self.num_inputs),
            ("G", "outputs", self.G, self.num_gradients),
        ):
            live = int(factor.diagonal().count_nonzero())
            if count >= live:
                continue
            values = moderate(BASES.eigenvalues(factor, f"Factor {name}"))[0]
            if float(values[count:].sum()) <= _REST * float(values.sum()):
                return (
                    f"Factor {name} rests on {count} positions, too few for its {live} live {side}: of the other "
                    "directions it says nothing, and an edit would remove them. Collect more positions, or insist "
                    "(CurvatureEditor(min_positions=0), --min-positions 0)."
                )
        return None

    @property
    def original(self) -> "LayerFactors":
        """The factors that these are a copy of on another device; themselves if they are no copy."""
        return self if self.copied_from is None else self.copied_from

    def to(self, device: torch.device) -> "LayerFactors":
        """Return a copy on another device, or these if they are there.

        The copy's basis is worked out there, and kept with these factors, where they are: the next copy takes it over.
        """
        if device == self.A.device:
            return self
        if self.copied_from is not None:
            return self.copied_from.to(device)
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        copy = dataclasses.replace(self, **moved)
        object.__setattr__(copy, "copied_from", self)
        BASES.add_copy(copy.A, self.A)
        BASES.add_copy(copy.G, self.G)
        return copy
