"""Editing weights: in place, for the time of a ``with`` block, or in a state dict; on one process or on several."""

import dataclasses
import functools
import math
import os
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature._checks import did_you_mean
from lightning_curvature._version import __version__
from lightning_curvature.distributed import Ranks, spread_like, whole
from lightning_curvature.editing import streaming
from lightning_curvature.editing.base import Editor
from lightning_curvature.editing.cost import LayerCost, price
from lightning_curvature.editing.projection import Projection, project_on_free_device, relative_change
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.editing.stored_weight import weight_matrix
from lightning_curvature.factors.decomposition import FaultyLayerError, TooFewPositionsError, moderate, scaled
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.layers.kinds import from_matrix, is_conv1d
from lightning_curvature.layers.modules import find_layer, layer_weights
from lightning_curvature.layers.ties import check_tie, find_tie, named_tensors, tied_names, with_replaced


class WeightEditor(Editor):
    """An edit that replaces weight matrices one by one; the methods differ in :meth:`project` alone.

    Arguments as :class:`Editor`.
    """

    keeps_at_full_energy = True
    """Whether an energy of 1 leaves a weight as it is."""

    ranks = Ranks()
    """The processes that edit together. With several, every method that edits is a collective."""

    skip_faulty = False
    """Whether a layer that cannot be edited (NaN, zero factors) is left as it is, with a warning."""

    reads_factors = True
    """Whether an edit depends on the spectra of the factors; if not, they only say which layers to edit."""

    @abstractmethod
    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the edited ``[d_out, d_in]`` weight; ``energy`` is below 1."""

    def check_positions(self, factors: LayerFactors) -> None:
        """Raise ``TooFewPositionsError`` if the factors rest on too few positions for this edit; by default never."""

    def edit_state_dict(
        self, state_dict: Mapping[str, Tensor], factors: KroneckerFactors
    ) -> tuple[dict[str, Tensor], EditReport]:
        """Return a state dict with edited weights; the input stays as it is.

        Tensors that are not edited are the same objects in both. Keys that are tied to an edited weight get the edited
        tensor too.

        Raises:
            ValueError: As :meth:`edit`.
        """
        weights = {}
        for name in self.energies(factors):
            key = f"{name}.weight"
            if key not in state_dict:
                raise ValueError(
                    f"Layer {name!r}: the state dict has no {key!r}.{did_you_mean(key, state_dict)} Were the factors "
                    "collected on another model? Layer names are relative to the module that was collected."
                )
            weights[name] = state_dict[key]
        new, report = self.edit_layers(weights, factors)
        return with_replaced(state_dict, weights, new), report.with_tied(tied_names(weights, state_dict))

    def edit_checkpoint(
        self, src: str | os.PathLike[str], factors: KroneckerFactors, dst: str | os.PathLike[str], **options: Any
    ) -> EditReport:
        """Write an edited copy of a saved checkpoint; arguments as :func:`.streaming.edit_checkpoint`."""
        return streaming.edit_checkpoint(self, src, factors, dst, **options)

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
        }

    def edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, and a report, computed from the factors alone."""
        transposed = {name: is_conv1d(find_layer(module, name)) for name in self.energies(factors)}
        weights = layer_weights(module, transposed)
        new, report = self.edit_layers(weights, factors, transposed)
        return new, report.with_tied(tied_names(weights, named_tensors(module)))

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
        # Shards of two weights may share memory on some processes alone, so all processes compare what they hold.
        for tie in self.ranks.gather(find_tie({name: weights[name] for name in energies})):
            check_tie(tie)
        owners = factors.owners or self.ranks.owners({name: float(weights[name].numel()) for name in energies})
        work = {}
        for name, energy in energies.items():
            weight = whole(weights[name].detach())
            if owners[name] == self.ranks.rank:
                is_transposed = factors[name].transposed if transposed is None else transposed[name]
                work[name] = functools.partial(self.edit_weight, name, weight, factors[name], energy, is_transposed)
        new, edits, skipped = {}, {}, {}
        for name, result in self.ranks.spread(energies, work, owners).items():
            if isinstance(result, TooFewPositionsError) or (isinstance(result, FaultyLayerError) and self.skip_faulty):
                skipped[name] = str(result)
            elif isinstance(result, ValueError):
                raise result
            else:
                weight, edits[name] = result
                new[name] = spread_like(weight, weights[name])
        if skipped and not new:
            raise FaultyLayerError(f"No layer can be edited: {next(iter(skipped.values()))}")
        for reason in skipped.values():
            warnings.warn(f"Left as it is: {reason}", stacklevel=2)
        return new, EditReport(edits, self.method, factors.provenance, skipped)

    def edit_weight(
        self, name: str, weight: Any, factors: LayerFactors, energy: float, transposed: bool
    ) -> tuple[Tensor, LayerEdit]:
        """Return a new weight, in the layout and dtype of the stored one, and the report of its edit.

        Args:
            name: Layer, for errors.
            weight: Stored weight.
            factors: Its factors.
            energy: Share to keep, in (0, 1].
            transposed: Whether the weight is stored as ``[d_in, d_out]``.

        Raises:
            ValueError: If the weight is quantized or on the meta device, the factors are for another shape, or they
                lack what the method needs.
            FaultyLayerError: A ``ValueError``; if the weight is no matrix of finite numbers, the factors hold NaN or
                only zeros, or the edited weight is too large for its dtype.
            TooFewPositionsError: A ``FaultyLayerError``; if the factors rest on too few positions.
        """
        stored = weight.detach()
        matrix = weight_matrix(name, stored, factors.shape, transposed)
        if energy == 1.0 and self.keeps_at_full_energy:
            projection, exponent = Projection(matrix, matrix.numel(), 1.0, LayerCost(0.0, None)), 0
        else:
            matrix, exponent = moderate(matrix)
            projection = self._project_layer(name, matrix, exponent, factors, energy)
        new = from_matrix(scaled(projection.weight, -exponent), stored, transposed)
        if not bool(torch.isfinite(new).all()):
            raise FaultyLayerError(f"Layer {name!r}: its edited weight is too large for {stored.dtype}.")
        edit = LayerEdit(
            energy=energy,
            energy_kept=projection.energy_kept,
            kept=projection.kept,
            total=matrix.numel(),
            relative_change=relative_change(projection.weight, matrix),
            changed=int((new != stored).sum()),
            tensor=f"{name}.weight",
            num_inputs=factors.num_inputs,
            dropped=1.0 - factors.num_inputs / factors.num_seen if factors.num_seen else 0.0,
            num_gradients=factors.num_gradients,
            needed=max(factors.shape) if self.reads_factors else 0,
            predicted_loss=None if projection.cost is None else projection.cost.nats,
            costliest=None if projection.cost is None else projection.cost.pair,
        )
        return new, edit

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
