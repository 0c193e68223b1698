"""What every editor is: the interface that all methods share, so that they are compared fairly."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import Tensor, nn
from typing_extensions import Self

from lightning_curvature._checks import check_energy, did_you_mean, listing
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.batch_norm import Recalibration, estimate
from lightning_curvature.editing.reference import Reference, ReferenceLike
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import layer_weights, write_weights
from lightning_curvature.layers.ties import named_tensors

DEFAULT_ENERGY = 0.85
"""Share of the curvature mass that is kept unless the user says otherwise; docs/decisions.md shows the evidence."""


class Editor(ABC):
    """Changes the weights of layers that some factors describe.

    Args:
        energy: Share to keep, in (0, 1]; or a dict of fnmatch patterns on layer names to shares. The first pattern
            that matches a layer counts, and layers without a match stay as they are.
        layers: fnmatch patterns on layer names; None for all layers of the factors.

    Raises:
        TypeError: If ``energy`` is no number, or ``layers`` no list of patterns.
        ValueError: If ``energy`` lies outside (0, 1].
    """

    method: str

    reference: Reference | None = None
    """What the weights were fine-tuned from, see :meth:`based_on`; None for an edit of the weights themselves."""

    recalibration: Recalibration | None = None
    """How statistics of batch norms are estimated anew, see :meth:`recalibrating`; None to leave them as they are."""

    ranks: Ranks = Ranks()
    """The processes that edit together. With several, every method that edits is a collective."""

    def __init__(self, energy: float | Mapping[str, float] = DEFAULT_ENERGY, layers: list[str] | None = None) -> None:
        self.energy = _check_energies(energy)
        if layers is not None and (isinstance(layers, str) or not all(isinstance(entry, str) for entry in layers)):
            raise TypeError(f"layers must be a list of name patterns or None, found {layers!r}.")
        self.layers = None if layers is None else list(layers)

    def at(self, energy: float | Mapping[str, float]) -> Self:
        """Return the same editor at another energy."""
        editor = copy.copy(self)
        editor.energy = _check_energies(energy)
        return editor

    def based_on(self, reference: ReferenceLike | Reference | None, scale: float = 1.0) -> Self:  # noqa: ARG002
        """Return the same editor for the update of a fine-tune: what lies in the reference stays.

        Args:
            reference: What the weights were fine-tuned from: a module, a state dict, or the path of a checkpoint; None
                to leave the editor as it is.
            scale: Factor of what is kept of the update of all weights, in (0, 1]; it takes over-fitting away. Weights
                without factors go towards the reference, too, less than the others.

        Raises:
            ValueError: If the method edits no updates, or the scale lies outside (0, 1].
        """
        if reference is not None:
            raise ValueError(f"{self.method} edits weights, and no updates: it takes no reference.")
        return self

    def recalibrating(self, recalibration: Recalibration | None) -> Self:
        """Return the same editor, which estimates statistics of batch norms anew after each edit of a module.

        Args:
            recalibration: What to run on the edited module, and for which batch norms; None to leave them as they are.
        """
        editor = copy.copy(self)
        editor.recalibration = recalibration
        return editor

    def edited_others(self, module: nn.Module, report: EditReport) -> dict[str, Tensor]:  # noqa: ARG002
        """Return new values of weights outside of the edited layers, by name; none unless there is a reference."""
        return {}

    @abstractmethod
    def edited_weights(self, module: nn.Module, factors: KroneckerFactors) -> tuple[dict[str, Tensor], EditReport]:
        """Return new weights by layer, and a report; the module stays as it is.

        Raises:
            ValueError: As :meth:`edit`.
        """

    def edit(self, module: nn.Module, factors: KroneckerFactors, reference: ReferenceLike | None = None) -> EditReport:
        """Edit the weights of a module in place.

        Args:
            module: The network.
            factors: Its factors, or those of the reference.
            reference: What the weights were fine-tuned from, see :meth:`based_on`.

        Raises:
            ValueError: If the factors do not fit the module (the message names the layer, both shapes and the remedy),
                or the weights of two layers are tied. Nothing is edited then.
        """
        editor = self.based_on(reference)
        new, report = editor.edited_weights(module, factors)
        others = editor.edited_others(module, report)
        if self.recalibration is not None:  # the user's code runs then, and may fail
            originals = {name: weight.detach().clone() for name, weight in layer_weights(module, new).items()}
            other_originals = {name: tensor.detach().clone() for name, tensor in _chosen(module, others).items()}
        write_weights(layer_weights(module, new), new)
        write_weights(_chosen(module, others), others)
        if self.recalibration is not None and not report.changes_nothing:
            try:
                statistics = estimate(module, self.recalibration, self.ranks)
            except Exception:
                write_weights(layer_weights(module, originals), originals)
                write_weights(_chosen(module, other_originals), other_originals)
                raise
            write_weights(_chosen(module, statistics), statistics)
        return report

    @contextmanager
    def applied(
        self, module: nn.Module, factors: KroneckerFactors, reference: ReferenceLike | None = None
    ) -> Iterator[EditReport]:
        """Edit a module for the time of a ``with`` block; afterwards it is bit for bit what it was.

        Arguments and errors as :meth:`edit`.
        """
        editor = self.based_on(reference)
        new, report = editor.edited_weights(module, factors)
        others = editor.edited_others(module, report)
        originals = {name: weight.detach().clone() for name, weight in layer_weights(module, new).items()}
        other_originals = {name: tensor.detach().clone() for name, tensor in _chosen(module, others).items()}
        try:
            write_weights(layer_weights(module, new), new)
            write_weights(_chosen(module, others), others)
            if self.recalibration is not None and not report.changes_nothing:
                statistics = estimate(module, self.recalibration, self.ranks)
                stale = _chosen(module, statistics)
                other_originals |= {name: tensor.detach().clone() for name, tensor in stale.items()}
                write_weights(stale, statistics)
            yield report
        finally:
            write_weights(layer_weights(module, originals), originals)
            write_weights(_chosen(module, other_originals), other_originals)

    def energies(self, factors: KroneckerFactors) -> dict[str, float]:
        """Return the energy of each layer to edit.

        Raises:
            ValueError: If there are no factors, or a pattern matches none of their layers.
        """
        if not factors:
            raise ValueError("There are no factors: nothing was collected yet, so there is nothing to edit with.")
        names = list(factors)
        for pattern in [*(self.layers or []), *(self.energy if isinstance(self.energy, dict) else [])]:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Pattern {pattern!r} matches no layer of the factors.{did_you_mean(pattern, names)} "
                    f"They hold {listing(names)}."
                )
        if self.layers is not None:
            names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.layers)]
        if not isinstance(self.energy, dict):
            return dict.fromkeys(names, self.energy)
        energies: dict[str, float] = {}
        for name in names:
            energy = next((energy for pattern, energy in self.energy.items() if fnmatchcase(name, pattern)), None)
            if energy is not None:
                energies[name] = energy
        if not energies:
            raise ValueError(f"energy={self.energy!r} and layers={self.layers!r} have no layer in common.")
        return energies


def _chosen(module: nn.Module, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return some parameters and buffers of a module."""
    tensors = named_tensors(module) if names else {}
    return {name: tensors[name] for name in names}


def _check_energies(energy: float | Mapping[str, float]) -> float | dict[str, float]:
    if isinstance(energy, Mapping):
        return {pattern: check_energy(value, f"energy[{pattern!r}]") for pattern, value in energy.items()}
    return check_energy(energy)
