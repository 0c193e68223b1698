"""The layers of a checkpoint to edit, one after the other: the factors of each layer are read once."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import Self

from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.editing.adapters import refuse_adapters
from lightning_curvature.editing.batch_norm import count_norms
from lightning_curvature.editing.origin import edited_layers, refuse_other_weights
from lightning_curvature.editing.others import moved
from lightning_curvature.editing.reference import MatchedReference, Reference
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.factors.decomposition import TooFewPositionsError
from lightning_curvature.factors.fingerprints import Fingerprint, difference
from lightning_curvature.factors.kronecker import KroneckerFactors, digest_of
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.memory import edit_bytes, size
from lightning_curvature.storage.hashes import tensor_hash

_NOTHING_CHANGES = (
    "The edit would change nothing: every weight, rounded to its dtype, stays what it is. Choose a smaller energy, "
    "or allow more (--perplexity)."
)

Part = Callable[[], tuple[Tensor, LayerFactors]]


class LayerEditor(Protocol):
    """What the edit of a saved checkpoint needs of an editor.

    :class:`lightning_curvature.editing.weight_editor.WeightEditor`, which imports this module, documents the methods.
    """

    method: str
    reference: Reference | None
    scale: float
    reads_factors: bool

    @property
    def is_joint(self) -> bool:
        """Whether all layers are looked at together before each is edited."""

    def based_on(self, reference: Reference, scale: float = 1.0) -> Self:
        """Return the same editor for the update since a reference."""

    def share_of_others(self, report: EditReport) -> float:
        """Return the share of their update that weights outside of the edited layers keep."""

    def energies(self, factors: KroneckerFactors) -> dict[str, float]:
        """Return the energy of each layer to edit."""

    def edit_weight(
        self,
        name: str,
        weight: Any,
        factors: LayerFactors,
        energy: float,
        transposed: bool,
        start: MatchedReference | None = None,
    ) -> tuple[Tensor, LayerEdit]:
        """Return a new weight, and the report of its edit."""

    def prepared(self, parts: Mapping[str, Part]) -> Self:
        """Return the editor for layers that are edited together."""

    def part(
        self, name: str, weight: Any, factors: LayerFactors, transposed: bool, start: MatchedReference | None = None
    ) -> tuple[Tensor, LayerFactors]:
        """Return the weight or the update of a layer, and its factors."""

    def facts(self, factors: KroneckerFactors, source: str, report: EditReport | None = None) -> dict[str, Any]:
        """Return what an edited checkpoint says about itself."""


class StreamedFactors(KroneckerFactors):
    """Factors that are read one layer at a time; a layer's digest and shape are noted when it is read.

    Args:
        factors: The factors.
        device: Device on which the layers are edited.

    Attributes:
        shapes: Shape ``(d_out, d_in)`` of the weight of each layer that was read.
    """

    def __init__(self, factors: KroneckerFactors, device: torch.device) -> None:
        super().__init__({}, factors.provenance)
        self._layers = self._factors = factors
        self.owners = factors.owners
        self.device = device
        self.shapes: dict[str, tuple[int, int]] = {}
        self._digests: dict[str, str] = {}
        self._last_A: tuple[Tensor, Tensor] | None = None  # as it was read, and on the device

    def __getitem__(self, name: str) -> LayerFactors:
        factors = super().__getitem__(name)
        self.shapes[name] = factors.shape
        if name not in self._digests:
            self._digests[name] = factors.digest()
        return factors

    def on_device(self, name: str) -> LayerFactors:
        """Return the factors of a layer on the device, as new tensors: an eigenbasis is freed with its tensors.

        Tied inputs in a row get the same ``A``, which is decomposed once.
        """
        factors = self[name]
        if self._last_A is None or self._last_A[0] is not factors.A:
            self._last_A = factors.A, factors.A.detach().to(self.device)
        moved: dict[str, Any] = {
            key: tensor.detach().to(self.device) for key, tensor in factors.tensors.items() if key != "A"
        }
        return dataclasses.replace(factors, A=self._last_A[1], **moved)

    def counts(self) -> dict[str, int]:
        """Return the positions behind the inputs' factor of each layer."""
        return self._factors.counts()

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return which weight each layer was collected on, where that is known."""
        return self._factors.fingerprints()

    def digest(self) -> str:
        """Return the digest of the factors; layers that were not edited are read for it."""
        for name in self:
            if name not in self._digests:
                self[name]
        return digest_of({name: self._digests[name] for name in self})


class EditedTensor(NamedTuple):
    """A tensor of a checkpoint before and after the edit."""

    name: str
    old: Tensor
    new: Tensor


class FileLayers:
    """The layers of a checkpoint to edit: go through :meth:`edits`, and then :meth:`others`; then call :meth:`finish`.

    Args:
        editor: Edits the weights.
        checkpoint: Holds the weights.
        factors: The factors.
        before: What the checkpoint says of an earlier edit.

    Attributes:
        names: Name of the weight of each layer in the checkpoint.

    Raises:
        ValueError: If a layer finds no tensor, or an edit would change a tied tensor.
    """

    def __init__(
        self, editor: LayerEditor, checkpoint: Checkpoint, factors: StreamedFactors, before: Mapping[str, Any] | None
    ) -> None:
        self.editor, self.checkpoint, self.factors, self.before = editor, checkpoint, factors, before
        self.energies = editor.energies(factors)
        self._edits: dict[str, LayerEdit] = {}
        self._skipped: dict[str, str] = {}
        self.names = self._matched()
        self._edited_before = self._tensors_edited_before()
        self._start = None if editor.reference is None else editor.reference.matched(self.names)
        self._num_others = 0
        checkpoint.check_ties(self.names.values())

    def _matched(self) -> dict[str, str]:
        """Return the name of the weight of each layer in the checkpoint."""
        shapes = self.checkpoint.shapes()
        names = match_layers(self.energies, shapes, self.checkpoint.module_names)
        refuse_adapters((name.removesuffix(".weight") for name in names.values()), shapes)
        return names

    def _tensors_edited_before(self) -> set[str]:
        """Return the names of the tensors that earlier edits changed."""
        layers = edited_layers(self.before)
        try:
            return set(match_layers(layers, self.checkpoint.shapes(), self.checkpoint.module_names).values())
        except ValueError:  # this file no longer holds some of the layers
            return {f"{layer}.weight" for layer in layers}

    def check_origin(self, source: str | os.PathLike[str], hashes: Mapping[str, str], force: bool) -> None:
        """Raise ``ValueError`` if the factors were collected on other weights; if forced, warn.

        Layers that were edited before are passed over: they differ, and the user was told of the earlier edit. With a
        reference, factors of the reference are as good as those of the weights.

        Args:
            source: The checkpoint, for errors.
            hashes: Hashes of the tensors.
            force: Warn instead.
        """
        recorded, distances = self.factors.fingerprints(), {}
        compared = [
            layer for layer in self.energies if layer in recorded and self.names[layer] not in self._edited_before
        ]
        for layer in compared:
            name = self.names[layer]
            distance = difference(recorded[layer], hashes[name], functools.partial(self.checkpoint.read, name))
            if distance is not None and not self._is_of_reference(layer, recorded[layer]):
                distances[layer] = distance
        if distances:
            refuse_other_weights(distances, len(compared), source, force)

    def _is_of_reference(self, layer: str, recorded: Fingerprint) -> bool:
        """Tell whether a layer's factors were collected on the reference."""
        if self._start is None:
            return False
        weight = self._start.layer(layer)
        return difference(recorded, tensor_hash(weight), weight.clone) is None

    def edits(self) -> Iterator[EditedTensor]:
        """Edit one layer after the other; a layer whose factors rest on too few positions is skipped.

        No tensor is kept here: a caller that drops each one has no more than one layer in memory.

        Raises:
            ValueError: If a layer cannot be edited.
            RuntimeError: If a layer does not fit on the GPU.
        """
        self.editor = self.editor.prepared({layer: functools.partial(self._part, layer) for layer in self.energies})
        for layer in tqdm(self.energies, unit="layer", desc="Editing", disable=None):
            try:
                edited = self._edit(layer)
            except TooFewPositionsError as error:
                self._skipped[layer] = str(error)
                continue
            while edited:
                yield edited.pop(0)

    def _part(self, layer: str) -> tuple[Tensor, LayerFactors]:
        factors = self.factors.on_device(layer)
        weight = self.checkpoint.read(self.names[layer])
        return self.editor.part(layer, weight, factors, factors.transposed, self._start)

    def _edit(self, layer: str) -> list[EditedTensor]:
        try:
            edited, self._edits[layer] = self._edited(layer, self.factors.on_device(layer))
        except torch.cuda.OutOfMemoryError as error:
            raise RuntimeError(
                f"Layer {layer!r}: editing it takes about {size(edit_bytes(*self.factors.shapes[layer]))}, more than "
                "the GPU has left. Edit on the CPU (device='cpu', --device cpu), or free the GPU."
            ) from error
        return edited

    def _edited(self, layer: str, factors: LayerFactors) -> tuple[list[EditedTensor], LayerEdit]:
        """Return the tensors of a layer that the edit replaces, and the report."""
        name = self.names[layer]
        old = self.checkpoint.read(name)
        new, edit = self.editor.edit_weight(layer, old, factors, self.energies[layer], factors.transposed, self._start)
        return [EditedTensor(name, old, new)], dataclasses.replace(edit, tensor=name)

    def others(self) -> Iterator[EditedTensor]:
        """Move the other weights that differ from the reference, one after the other; call it after :meth:`edits`."""
        share = self.editor.share_of_others(self._report())
        if self._start is None or share == 1.0:
            return
        done = set().union(*(self.checkpoint.tied_to(self.names[layer]) for layer in self._edits))
        for name, shape in self.checkpoint.shapes().items():
            read = None if name in done else self._start.counterpart(name, shape)
            if read is None or not (old := self.checkpoint.read(name)).is_floating_point():
                continue
            done |= self.checkpoint.tied_to(name)
            if (new := moved(old, read(), share)) is not None:
                self._num_others += 1
                yield EditedTensor(name, old, new)

    def _report(self) -> EditReport:
        source = None if self.editor.reference is None else self.editor.reference.name
        facts = self.editor.method, self.factors.provenance, self._skipped, source, self._num_others
        return EditReport(self._edits, *facts, norms=count_norms(self.checkpoint.shapes()))

    def finish(self) -> EditReport:
        """Return the report, after the last edit; warn of the layers that were skipped.

        Raises:
            ValueError: If no layer could be edited, or no weight changed.
        """
        if not self._edits:
            raise ValueError(f"No layer can be edited: {next(iter(self._skipped.values()))}")
        if not any(edit.changed for edit in self._edits.values()):
            raise ValueError(_NOTHING_CHANGES)
        for reason in self._skipped.values():
            warnings.warn(f"Not edited: {reason}", stacklevel=3)
        return self._report()
