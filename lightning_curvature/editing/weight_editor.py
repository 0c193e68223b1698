"""Editing weights: in place, for the time of a ``with`` block, or in a state dict; on one process or on several."""

import copy
import dataclasses
import functools
import math
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_curvature._checks import did_you_mean
from lightning_curvature._version import __version__
from lightning_curvature.distributed import Ranks, spread_like, whole
from lightning_curvature.editing import streaming
from lightning_curvature.editing.adapter_edits import edit_adapters, edit_saved_adapters
from lightning_curvature.editing.adapters import find_adapters, refuse_adapters
from lightning_curvature.editing.base import Editor
from lightning_curvature.editing.cost import LayerCost, price
from lightning_curvature.editing.others import other_weights
from lightning_curvature.editing.projection import (
    Projection,
    project_on_free_device,
    relative_change,
    share_kept,
)
from lightning_curvature.editing.reference import MatchedReference, Reference, ReferenceLike
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.editing.results import sort_results
from lightning_curvature.editing.stored_weight import weight_matrix
from lightning_curvature.factors.decomposition import FaultyLayerError, moderate, scaled
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.layers.kinds import as_matrix, from_matrix, is_conv1d
from lightning_curvature.layers.modules import find_layer, layer_weights
from lightning_curvature.layers.ties import check_tie, find_tie, named_tensors, tied_names, with_replaced

Part = Callable[[], tuple[Tensor, LayerFactors]]
"""Returns the weight or the update of a layer, ``[d_out, d_in]``, and its factors."""


class WeightEditor(Editor):
    """An edit that replaces weight matrices one by one; the methods differ in :meth:`project` alone.

    Arguments as :class:`Editor`.
    """

    keeps_at_full_energy = True
    """Whether an energy of 1 leaves a weight as it is."""

    penalty: float | None = None
    """One strength for all layers, which takes the place of energies; see :mod:`lightning_curvature.editing.budget`."""

    budget: float | None = None
    """What an edit may cost over all its layers, which are then looked at together before each is edited."""

    ranks = Ranks()
    """The processes that edit together. With several, every method that edits is a collective."""

    skip_faulty = False
    """Whether a layer that cannot be edited (NaN, zero factors) is left as it is, with a warning."""

    reads_factors = True
    """Whether an edit depends on the spectra of the factors; if not, they only say which layers to edit."""

    @abstractmethod
    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the edited ``[d_out, d_in]`` weight; ``energy`` is below 1, or nothing to this method."""

    @override
    def based_on(self, reference: ReferenceLike | Reference | None) -> Self:
        if reference is None:
            return self
        editor = copy.copy(self)
        editor.reference = reference if isinstance(reference, Reference) else Reference(reference)
        return editor

    def prepared(self, parts: Mapping[str, Part]) -> Self:  # noqa: ARG002
        """Return the editor for layers that are edited together.

        Args:
            parts: For each layer of this process, what returns its weight (or update), and its factors.
        """
        return self

    def check_positions(self, factors: LayerFactors) -> None:
        """Raise ``TooFewPositionsError`` if the factors rest on too few positions for this edit; by default never."""

    def edit_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        factors: KroneckerFactors,
        reference: ReferenceLike | None = None,
        module: nn.Module | None = None,
    ) -> tuple[dict[str, Tensor], EditReport]:
        """Return a state dict with edited weights; the input stays as it is.

        Tensors that are not edited are the same objects in both. Keys that are tied to an edited weight get the edited
        tensor too.

        Args:
            state_dict: Tensors by name.
            factors: Factors of its layers, or of those of the reference.
            reference: What the weights were fine-tuned from, see :meth:`based_on`.
            module: The module whose state dict it is; needed if it has active LoRA adapters, which are edited then:
                their scaling is not in the state dict.

        Raises:
            ValueError: As :meth:`edit`.
        """
        editor = self.based_on(reference)
        adapters = None if module is None else find_adapters(module, self.energies(factors))
        if adapters is not None:
            return edit_saved_adapters(editor, adapters, state_dict, factors)
        if module is None:
            refuse_adapters(self.energies(factors), state_dict)
        weights = {}
        for name in self.energies(factors):
            key = f"{name}.weight"
            if key not in state_dict:
                raise ValueError(
                    f"Layer {name!r}: the state dict has no {key!r}.{did_you_mean(key, state_dict)} Were the factors "
                    "collected on another model? Layer names are relative to the module that was collected."
                )
            weights[name] = state_dict[key]
        new, report = editor.edit_layers(weights, factors)
        tied = tied_names(weights, state_dict)
        others = other_weights(editor.reference, state_dict, tied, report)
        replaced = {**weights, **{name: state_dict[name] for name in others}}
        report = dataclasses.replace(report.with_tied(tied), others=len(others))
        return with_replaced(state_dict, replaced, {**new, **others}), report

    def edit_checkpoint(
        self,
        src: str | os.PathLike[str],
        factors: KroneckerFactors,
        dst: str | os.PathLike[str],
        reference: ReferenceLike | None = None,
        **options: Any,
    ) -> EditReport:
        """Write an edited copy of a saved checkpoint; other arguments as :func:`.streaming.edit_checkpoint`."""
        return streaming.edit_checkpoint(self.based_on(reference), src, factors, dst, **options)

    def facts(self, factors: KroneckerFactors, source: str, report: EditReport | None = None) -> dict[str, Any]:
        """Return what an edited checkpoint says about itself, as JSON values.

        Args:
            factors: The factors.
            source: Hash of the unedited weights, see :func:`lightning_curvature.storage.hashes.content_hash`.
            report: Report of the edit, if it was made: it adds how far each layer moved, what that is predicted to
                cost, and which layers were skipped.
        """
        positions = factors.counts()
        layers: dict[str, dict[str, Any]] = {
            name: {"energy": energy, "positions": positions[name]} for name, energy in self.energies(factors).items()
        }
        skipped = {}
        if report is not None:
            layers = {
                name: {**layers[name], "relative_change": edit.relative_change, **_finite(edit.predicted_loss)}
                for name, edit in report.layers.items()
            }
            skipped = {"skipped": dict(report.skipped)} if report.skipped else {}
        return {
            "method": self.method,
            "package": f"lightning_curvature {__version__}",
            "source": source,
            "factors": factors.digest(),
            "provenance": factors.provenance,
            "layers": layers,
            **skipped,
            **({} if self.reference is None else {"reference": self.reference.facts()}),
        }

    def edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, and a report, computed from the factors alone."""
        if (adapters := find_adapters(module, self.energies(factors))) is not None:
            new, report = edit_adapters(self, adapters, named_tensors(module), factors)
            return {name.removesuffix(".weight"): tensor for name, tensor in new.items()}, report
        transposed = {name: is_conv1d(find_layer(module, name)) for name in self.energies(factors)}
        weights = layer_weights(module, transposed)
        new, report = self.edit_layers(weights, factors, transposed)
        return new, report.with_tied(tied_names(weights, named_tensors(module)))

    def edited_others(self, module: nn.Module, report: EditReport) -> dict[str, Tensor]:
        """Return new values of the weights outside of the edited layers that differ from the reference, by name."""
        if self.reference is None:
            return {}
        tensors = named_tensors(module)
        names = [*report.layers, *report.skipped]
        adapters = find_adapters(module, names)
        weights = layer_weights(module, names if adapters is None else adapters.held)
        return other_weights(self.reference, tensors, tied_names(weights, tensors), report)

    def edit_layers(
        self, weights: Mapping[str, Tensor], factors: KroneckerFactors, transposed: Mapping[str, bool] | None = None
    ) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, laid out as the old ones are, and a report.

        With several processes each one edits a part of the layers, and every process gets all new weights. A layer
        whose factors rest on too few positions stays as it is, with a warning.

        Args:
            weights: Stored weights by layer. Sharded weights are gathered, one layer at a time.
            factors: The factors.
            transposed: Whether a weight is stored as ``[d_in, d_out]``; by default as the factors say.

        Raises:
            ValueError: As :meth:`edit_weight`, for the first such layer, on all processes; or if the weights of two
                layers are tied, or no layer can be edited.
        """
        energies = self.energies(factors)
        start = None
        if self.reference is not None:
            start = self.reference.matched({name: f"{name}.weight" for name in energies})
        # Shards of two weights may share memory on some processes alone, so all processes compare what they hold.
        for tie in self.ranks.gather(find_tie({name: weights[name] for name in energies})):
            check_tie(tie)
        owners = factors.owners or self.ranks.owners({name: float(weights[name].numel()) for name in energies})
        work: dict[str, Any] = {}
        parts: dict[str, Part] = {}
        for name, energy in energies.items():
            weight = whole(weights[name].detach())
            if owners[name] == self.ranks.rank:
                is_transposed = factors[name].transposed if transposed is None else transposed[name]
                arguments = (name, weight, factors[name], energy, is_transposed, start)
                work[name], parts[name] = arguments, functools.partial(self.part, *arguments[:3], *arguments[4:])
        editor = self.prepared(parts)
        edits_of = {name: functools.partial(editor.edit_weight, *arguments) for name, arguments in work.items()}
        made, edits, skipped = sort_results(self.ranks.spread(energies, edits_of, owners), self.skip_faulty)
        new = {name: spread_like(weight, weights[name]) for name, weight in made.items()}
        source = None if self.reference is None else self.reference.name
        return new, EditReport(edits, self.method, factors.provenance, skipped, source)

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
        stored = weight.detach()
        matrix = weight_matrix(name, stored, factors.shape, transposed)
        first = None if start is None else self._start_matrix(name, start, stored, factors, transposed)
        part = matrix if first is None else matrix.double() - first
        is_whole = energy == 1.0 and self.keeps_at_full_energy and self.penalty is None
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
            raise ValueError(f"In the reference: {error}") from error
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
            projection = self.project(matrix, factors, energy)
            cost = price(projection.weight - matrix, factors, self.reads_factors, exponent)
            return dataclasses.replace(projection, cost=cost)

        try:
            return project_on_free_device(name, matrix, factors, project)
        except ValueError as error:
            kind = type(error) if isinstance(error, FaultyLayerError) else ValueError
            raise kind(f"Layer {name!r}: {error}") from error


def _finite(predicted_loss: float | None) -> dict[str, float]:
    """Return what a file says of a predicted loss: nothing if it is not known, or no number."""
    known = predicted_loss is not None and math.isfinite(predicted_loss)
    return {"predicted_loss": predicted_loss} if known and predicted_loss is not None else {}
