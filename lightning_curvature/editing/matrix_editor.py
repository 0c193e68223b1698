"""The edit of one weight matrix, or of its update."""

import copy
import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self, override

from lightning_curvature._checks import check_energy
from lightning_curvature.editing.base import Editor
from lightning_curvature.editing.cost import LayerCost, price, price_pairs
from lightning_curvature.editing.projection import (
    Projection,
    project_on_free_device,
    relative_change,
    share_kept,
)
from lightning_curvature.editing.reference import MatchedReference, Reference, ReferenceLike
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.editing.stored_weight import weight_matrix
from lightning_curvature.factors.decomposition import FaultyLayerError, moderate, scaled
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.layers.kinds import as_matrix, from_matrix

Part = Callable[[], tuple[Tensor, LayerFactors]]
"""Returns the weight or the update of a layer, ``[d_out, d_in]``, and its factors."""


class MatrixEditor(Editor):
    """An edit that replaces weight matrices one by one; the methods differ in :meth:`project` alone.

    Arguments as :class:`Editor`.
    """

    keeps_at_full_energy = True
    """Whether an energy of 1 leaves a weight as it is."""

    penalty: float | None = None
    """One strength for all layers, which takes the place of energies; see :mod:`lightning_curvature.editing.budget`."""

    share: float | None = None
    """Energy of every layer, found so that a budget is met; it takes the place of energies."""

    scale = 1.0
    """Factor of what is kept of an update, see :meth:`based_on`."""

    budget: float | None = None
    """What an edit may cost over all its layers."""

    reads_factors = True
    """Whether an edit depends on the spectra of the factors; if not, they only say which layers to edit."""

    @property
    def is_joint(self) -> bool:
        """Whether all layers are looked at together before each is edited, see :meth:`prepared`."""
        return False

    @abstractmethod
    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the edited ``[d_out, d_in]`` weight; ``energy`` is below 1, or nothing to this method."""

    @override
    def based_on(self, reference: ReferenceLike | Reference | None, scale: float = 1.0) -> Self:
        if reference is None:
            return self
        editor = copy.copy(self)
        editor.scale = check_energy(scale, "scale")
        editor.reference = reference if isinstance(reference, Reference) else Reference(reference)
        return editor

    def share_of_others(self, report: EditReport) -> float:
        """Return the share of their update that weights outside of the edited layers keep.

        It is the geometric mean of the factor of all updates and of what the layers keep; see "What the measured price
        is counted from" in ``docs/decisions.md``.

        Args:
            report: The report of the edited layers.
        """
        return math.sqrt(self.scale * (self.scale if report.update_kept is None else report.update_kept))

    def prepared(self, parts: Mapping[str, Part]) -> Self:  # noqa: ARG002
        """Return the editor for layers that are edited together.

        Args:
            parts: For each layer of this process, what returns its weight (or update), and its factors.
        """
        return self

    def check_positions(self, factors: LayerFactors) -> None:
        """Raise ``TooFewPositionsError`` if the factors rest on too few positions for this edit; by default never."""

    def edit_weight(
        self,
        name: str,
        weight: Any,
        factors: LayerFactors,
        energy: float,
        transposed: bool,
        start: MatchedReference | None = None,
    ) -> tuple[Tensor, LayerEdit]:
        """Return a new weight, in the layout and dtype of the stored one, and the report of its edit.

        Args:
            name: Layer, for errors.
            weight: Stored weight.
            factors: Its factors.
            energy: Share to keep, in (0, 1].
            transposed: Whether the weight is stored as ``[d_in, d_out]``.
            start: The reference, for an edit of the update.

        Raises:
            ValueError: If the weight is quantized or on the meta device, the factors are for another shape, or they
                lack what the method needs.
            FaultyLayerError: A ``ValueError``; if the weight is no matrix of finite numbers, the factors hold NaN or
                only zeros, or the edited weight is too large for its dtype.
            TooFewPositionsError: A ``FaultyLayerError``; if the factors rest on too few positions.
        """
        energy = energy if self.share is None else self.share
        stored = weight.detach()
        matrix = weight_matrix(name, stored, factors.shape, transposed)
        first = None if start is None else self._start_matrix(name, start, stored, factors, transposed)
        part = matrix if first is None else matrix.double() - first
        is_whole = energy == 1.0 and self.keeps_at_full_energy and self.penalty is None and self.scale == 1.0
        if is_whole or (first is not None and not bool(part.any())):
            projection, exponent = Projection(part, part.numel(), 1.0, LayerCost(0.0, None)), 0
        else:
            part, exponent = moderate(part)
            projection = self._project_layer(name, part, exponent, factors, energy)
        edited = scaled(projection.weight, -exponent)
        new = from_matrix(edited if first is None else first + edited, stored, transposed)
        if not bool(torch.isfinite(new).all()):
            raise FaultyLayerError(f"Layer {name!r}: its edited weight is too large for {stored.dtype}.")
        edit = LayerEdit(
            energy=energy if self.penalty is None else None,
            energy_kept=projection.energy_kept,
            kept=projection.kept,
            total=matrix.numel(),
            relative_change=relative_change(as_matrix(new, transposed) if start else edited, matrix),
            changed=int((new != stored).sum()),
            tensor=f"{name}.weight",
            num_inputs=factors.num_inputs,
            dropped=1.0 - factors.num_inputs / factors.num_seen if factors.num_seen else 0.0,
            num_gradients=factors.num_gradients,
            needed=max(factors.shape) if self.reads_factors else 0,
            predicted_loss=None if projection.cost is None else projection.cost.nats,
            costliest=None if projection.cost is None else projection.cost.pair,
            update=None if first is None else relative_change(first, matrix),
            update_kept=None if first is None else share_kept(projection.weight, part),
        )
        return new, edit

    def part(
        self, name: str, weight: Any, factors: LayerFactors, transposed: bool, start: MatchedReference | None = None
    ) -> tuple[Tensor, LayerFactors]:
        """Return what :meth:`edit_weight` projects: a weight as a matrix, or its update; and its factors."""
        stored = weight.detach()
        matrix = weight_matrix(name, stored, factors.shape, transposed)
        if start is not None:
            matrix = matrix.double() - self._start_matrix(name, start, stored, factors, transposed)
        return matrix, factors

    def _start_matrix(
        self, name: str, start: MatchedReference, stored: Tensor, factors: LayerFactors, transposed: bool
    ) -> Tensor:
        """Return the weight of a layer in the reference, float64 ``[d_out, d_in]``; errors say where it is from."""
        try:
            first = weight_matrix(name, start.layer(name), factors.shape, transposed)
        except ValueError as error:
            kind = type(error) if isinstance(error, FaultyLayerError) else ValueError
            raise kind(f"In the reference: {error}") from error
        return first.to(stored.device, torch.float64)

    def _project_layer(
        self, name: str, matrix: Tensor, exponent: int, factors: LayerFactors, energy: float
    ) -> Projection:
        """Check the factors of a layer, project its weight and price that, on a free device; errors name the layer.

        Args:
            name: Layer, for errors.
            matrix: Its weight times ``2**exponent``, ``[d_out, d_in]``.
            exponent: See ``matrix``.
            factors: Its factors.
            energy: Share to keep, below 1.
        """

        def project(matrix: Tensor, factors: LayerFactors) -> Projection:
            self.check_positions(factors)
            if energy == 1.0 and self.keeps_at_full_energy and self.penalty is None:
                projection = Projection(matrix, matrix.numel(), 1.0)
            else:
                projection = self.project(matrix, factors, energy)
            if self.scale != 1.0:
                projection = dataclasses.replace(projection, weight=self.scale * projection.weight)
            if projection.change is None:
                cost = price(projection.weight - matrix, factors, self.reads_factors, exponent)
            else:
                cost = price_pairs(projection.change, factors, exponent)
            return dataclasses.replace(projection, cost=cost, change=None)

        try:
            return project_on_free_device(name, matrix, factors, project)
        except ValueError as error:
            kind = type(error) if isinstance(error, FaultyLayerError) else ValueError
            raise kind(f"Layer {name!r}: {error}") from error
