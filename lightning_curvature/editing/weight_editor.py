"""Editing weights: in place, for the time of a ``with`` block, or in a state dict; on one process or on several."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_curvature._checks import did_you_mean
from lightning_curvature._version import __version__
from lightning_curvature.distributed import spread_like, whole
from lightning_curvature.editing import streaming
from lightning_curvature.editing.adapter_edits import edit_adapters, edit_saved_adapters
from lightning_curvature.editing.adapters import find_adapters, refuse_adapters
from lightning_curvature.editing.batch_norm import batch_norms, count_norms
from lightning_curvature.editing.matrix_editor import MatrixEditor, Part
from lightning_curvature.editing.others import other_weights
from lightning_curvature.editing.reference import ReferenceLike
from lightning_curvature.editing.report import EditReport
from lightning_curvature.editing.results import sort_results
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import is_conv1d
from lightning_curvature.layers.modules import find_layer, layer_weights
from lightning_curvature.layers.ties import check_tie, find_tie, named_tensors, tied_names, with_replaced


class WeightEditor(MatrixEditor):
    """An edit of weight matrices: in a module, a state dict, or a file.

    Arguments as :class:`~lightning_curvature.editing.base.Editor`.
    """

    skip_faulty = False
    """Whether a layer that cannot be edited (NaN, zero factors) is left as it is, with a warning."""

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
        done = {name: names for name, names in tied.items() if name in report.layers}
        others = other_weights(editor.reference, state_dict, done, report, editor.share_of_others(report))
        replaced = {**weights, **{name: state_dict[name] for name in others}}
        norms = count_norms(state_dict)
        report = dataclasses.replace(report.with_tied(tied), others=len(others), norms=norms)
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
            **({} if report is None or not report.renewed else {"batch_norms": report.renewed}),
            **({} if self.reference is None else {"reference": {**self.reference.facts(), "scale": self.scale}}),
        }

    def edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, and a report, computed from the factors alone."""
        norms = batch_norms(module)
        renewed = [] if self.recalibration is None else [name for name in norms if name in self.recalibration.norms]
        new, report = self._edited_weights(module, factors)
        return new, dataclasses.replace(report, norms=len(norms), renewed=0 if report.changes_nothing else len(renewed))

    def _edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
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
        adapters = find_adapters(module, report.layers)
        weights = layer_weights(module, report.layers if adapters is None else adapters.held)
        return other_weights(
            self.reference, tensors, tied_names(weights, tensors), report, self.share_of_others(report)
        )

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


def _finite(predicted_loss: float | None) -> dict[str, float]:
    """Return what a file says of a predicted loss: nothing if it is not known, or no number."""
    known = predicted_loss is not None and math.isfinite(predicted_loss)
    return {"predicted_loss": predicted_loss} if known and predicted_loss is not None else {}
