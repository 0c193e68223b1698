"""The layers of a checkpoint to edit, one after the other: each one's factors are read once."""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.editing.base import LayerEditor
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.factors.basis import TooFewPositionsError
from lightning_curvature.factors.fingerprints import Fingerprint, difference
from lightning_curvature.factors.kronecker import KroneckerFactors, LayerFactors, digest_of
from lightning_curvature.memory import edit_bytes, size

_NOTHING = (
    "The edit would change nothing: every weight, rounded to its dtype, stays what it is. Choose a smaller energy, "
    "or allow more (--perplexity)."
)


class OneByOne(KroneckerFactors):
    """Factors of one layer after the other, each of which is read once: its digest and its shape are taken then.

    Args:
        factors: The factors.
        device: Where a layer's are moved to be edited.

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
        self._A: tuple[Tensor, Tensor] | None = None

    def __getitem__(self, name: str) -> LayerFactors:
        found = super().__getitem__(name)
        self.shapes[name] = found.shape
        if name not in self._digests:
            self._digests[name] = found.digest()
        return found

    def __call__(self, name: str) -> LayerFactors:
        """Return the factors of a layer, as tensors of their own: what is worked out from them goes with these.

        An eigenbasis goes with its layer, or with the last in a row that share A.
        """
        found = self[name]
        if self._A is None or self._A[0] is not found.A:
            self._A = found.A, found.A.detach().to(self.device)
        here: dict[str, Any] = {
            key: tensor.detach().to(self.device) for key, tensor in found.tensors.items() if key != "A"
        }
        return dataclasses.replace(found, A=self._A[1], **here)

    def counts(self) -> dict[str, int]:
        """Return the positions behind the inputs' factor of each layer."""
        return self._factors.counts()

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return which weight each layer was collected on, where that is known."""
        return self._factors.fingerprints()

    def digest(self) -> str:
        """Return what the factors' own method does; layers that were not edited are read here."""
        for name in self:
            if name not in self._digests:
                self[name]
        return digest_of({name: self._digests[name] for name in self})


def refuse_others(far: Mapping[str, float], count: int, source: str | os.PathLike[str], force: bool) -> None:
    """Raise ``ValueError`` since layers have other weights than their factors were collected on; if forced, warn.

    Args:
        far: How far each of them is, see :func:`lightning_curvature.factors.fingerprints.difference`.
        count: How many layers were compared.
        source: The checkpoint.
        force: Whether to go on.
    """
    furthest = max(far.values())
    how = f"the furthest is {furthest:.2g} of its norm away, by a sample of its entries" if furthest else "few entries"
    found = (
        f"{len(far)} of {count} layers of {source} have other weights than those that the factors were collected on: "
        f"{listing(far, 3)}; {how}."
    )
    if not force:
        raise ValueError(
            f"{found} Were they collected on another model? If this is a fine-tune of the model that they were "
            "collected on, and you mean to use these factors, add --force (force=True)."
        )
    warnings.warn(found, stacklevel=4)


class FileLayers:
    """The layers of a checkpoint to edit.

    Args:
        editor: Edits them.
        checkpoint: Holds their weights.
        factors: Their factors.
        before: What the checkpoint says of an earlier edit.

    Attributes:
        names: By layer, the tensor of its weight.
    """

    def __init__(
        self, editor: LayerEditor, checkpoint: Checkpoint, factors: OneByOne, before: Mapping[str, Any] | None
    ) -> None:
        self.editor, self.checkpoint, self.factors = editor, checkpoint, factors
        self.energies = editor.energies(factors)
        self.names = match_layers(self.energies, checkpoint.shapes(), checkpoint.module_names)
        self._edited = self._edited_before(before)
        checkpoint.check_ties(self.names.values())

    def check_origin(self, source: str | os.PathLike[str], hashes: Mapping[str, str], force: bool) -> None:
        """Raise ``ValueError`` if the factors were collected on other weights, unless forced, which warns.

        Layers that were edited already differ, and are passed over: that was told.

        Args:
            source: The checkpoint, for errors.
            hashes: Hashes of the tensors.
            force: Whether to go on.
        """
        recorded, far = self.factors.fingerprints(), {}
        asked = [layer for layer in self.energies if layer in recorded and self.names[layer] not in self._edited]
        for layer in asked:
            name = self.names[layer]
            distance = difference(recorded[layer], hashes[name], functools.partial(self.checkpoint.read, name))
            if distance is not None:
                far[layer] = distance
        if far:
            refuse_others(far, len(asked), source, force)

    def _edited_before(self, before: Mapping[str, Any] | None) -> set[str]:
        """Return the tensors that earlier edits changed."""
        layers: dict[str, None] = {}
        while isinstance(before, Mapping):
            layers |= dict.fromkeys(before.get("layers", {}))
            before = before.get("before")
        try:
            return set(match_layers(layers, self.checkpoint.shapes(), self.checkpoint.module_names).values())
        except ValueError:  # some of them are in this file no more
            return {f"{layer}.weight" for layer in layers}

    def edit(self, keep: Callable[[str, Tensor, Tensor], None]) -> EditReport:
        """Edit one layer after the other.

        Args:
            keep: Takes the name of a tensor, the old and the new one.
        """
        reports: dict[str, LayerEdit] = {}
        skipped: dict[str, str] = {}
        for layer in tqdm(self.energies, unit="layer", desc="Editing", disable=None):
            name = self.names[layer]
            old = self.checkpoint.read(name)
            try:
                new, report = self._edit(layer, old)
            except TooFewPositionsError as error:
                skipped[layer] = str(error)
                continue
            reports[layer] = dataclasses.replace(report, tensor=name)
            keep(name, old, new)
        if not reports:
            raise ValueError(f"No layer can be edited: {next(iter(skipped.values()))}")
        if not any(report.changed for report in reports.values()):
            raise ValueError(_NOTHING)
        for reason in skipped.values():
            warnings.warn(f"Left as it is: {reason}", stacklevel=3)
        return EditReport(reports, self.editor.method, self.factors.provenance, skipped)

    def _edit(self, layer: str, weight: Tensor) -> tuple[Tensor, LayerEdit]:
        try:
            factors = self.factors(layer)
            return self.editor.edit_weight(layer, weight, factors, self.energies[layer], factors.transposed)
        except torch.cuda.OutOfMemoryError as error:
            raise RuntimeError(
                f"Layer {layer!r}: editing it takes about {size(edit_bytes(*self.factors.shapes[layer]))}, more than "
                "the GPU has left. Edit on the CPU (device='cpu', --device cpu), or free the GPU."
            ) from error
