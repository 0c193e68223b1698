"""Edits of saved checkpoints, as a stream of tensors."""

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lightning_curvature._checks import listing
from lightning_curvature.basis import TooFewPositionsError
from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.formats import Checkpoint, checkpoint_hashes, content_hash
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.checkpoints.outputs import check_name, check_outputs, check_safetensors_name
from lightning_curvature.checkpoints.scratch import Scratch
from lightning_curvature.deltas import DeltaRecord, open_weights
from lightning_curvature.editing import WeightEditor
from lightning_curvature.factors import KroneckerFactors, LayerFactors, digest_of
from lightning_curvature.fingerprints import Fingerprint, difference
from lightning_curvature.plan import edit_bytes, size
from lightning_curvature.report import EditReport, LayerEdit

_NOTHING = (
    "The edit would change nothing: every weight, rounded to its dtype, stays what it is. Choose a smaller energy."
)
_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class EditPlan:
    """What an edit of a checkpoint would do.

    Args:
        report: Per layer, as after the edit.
        bytes_read: Bytes to read: the whole checkpoint twice, for its hash and for the copy.
        bytes_written: Bytes of the whole checkpoint.
        peak_bytes: Memory that the largest layer needs, see :func:`lightning_curvature.plan.edit_bytes`.
    """

    report: EditReport
    bytes_read: int
    bytes_written: int
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.report}\n{matches(self.report)}\nTo read: {size(self.bytes_read)}; to write: "
            f"{size(self.bytes_written)}; memory for the largest layer: {size(self.peak_bytes)}."
        )


def matches(report: EditReport) -> str:
    """Return which tensor each layer was matched with, as text."""
    return "\n".join(["Tensors:", *(f"  {layer} -> {edit.tensor}" for layer, edit in report.layers.items())])


def edit_checkpoint(
    editor: WeightEditor,
    source: _Path,
    factors: KroneckerFactors,
    target: _Path,
    *,
    overwrite: bool = False,
    delta: _Path | None = None,
    allow_globals: Sequence[str] = (),
    to_hf: _Path | None = None,
    device: str | torch.device = "auto",
    force: bool = False,
) -> EditReport:
    """Write an edited copy of a checkpoint in the same format; everything that is not edited stays byte-identical.

    What is not edited passes through memory in chunks, and each layer's factors are read once.

    Args:
        editor: Edits the weights.
        source: Hugging Face folder, ``.safetensors`` file, Lightning checkpoint, or state dict of ``torch.save``.
        factors: Factors of its layers; names are matched by rule, see :mod:`lightning_curvature.checkpoints.names`.
        target: File or folder to write, atomically; its name is one of the source's format.
        overwrite: Whether ``target`` may exist.
        delta: Also write a file that turns the copy into the source again, and the source into the copy.
        allow_globals: Classes that a file of ``torch.save`` may hold.
        to_hf: Write a Hugging Face folder instead, from a file of ``torch.save`` whose module holds a Hugging Face
            model: a folder with the model's ``config.json``, and a tokenizer and whatever else should be copied.
        device: Where layers are decomposed and edited, one at a time: ``"auto"``, the GPU if there is one, or a device.
        force: Edit although the weights are not those that the factors were collected on, as those of a fine-tune.

    Returns:
        What was done. A layer whose factors rest on too few positions is left as it is, with a warning.

    Raises:
        FileExistsError: If the target is the source, or exists.
        ValueError: If a layer finds no tensor, a shape does not fit, nothing would change, the device cannot edit, a
            name is one of another format, or the factors were collected on other weights.
        RuntimeError: If a layer does not fit on the GPU.
    """
    own = _OneByOne(factors, edit_device(device))
    checkpoint = open_to_edit(source, target, overwrite, delta, allow_globals, to_hf)
    _warn_if_edited(checkpoint)
    with ExitStack() as stack:
        scratch = stack.enter_context(Scratch(Path(target)))
        hashes = checkpoint_hashes(checkpoint)
        before, unedited = checkpoint.provenance, content_hash(hashes)
        if to_hf is not None:
            from lightning_curvature.checkpoints.conversion import to_folder  # those who need it import transformers

            edited = to_folder(_archive(checkpoint), to_hf, scratch.path / "model")
            checkpoint, hashes = edited, checkpoint_hashes(edited)
        layers = _Layers(editor, checkpoint, own, before)
        layers.check_origin(hashes, force)
        record = None if delta is None else stack.enter_context(DeltaRecord(Path(delta), checkpoint, hashes))
        new: dict[str, Callable[[], Tensor]] = {}

        def keep(name: str, old: Tensor, edited: Tensor) -> None:
            new[name] = scratch.keep(edited)
            if record is not None:
                record.add(name, old, edited)

        report = layers.edit(keep)
        facts = _facts(editor, own, unedited, report, before)
        if record is not None:
            record.write(facts)  # before the target appears: there is never an edited copy without its delta
        checkpoint.copy(target, new, facts)
        if record is not None:
            record.keep = True
    return report


def plan_edit(
    editor: WeightEditor,
    source: _Path,
    factors: KroneckerFactors,
    allow_globals: Sequence[str] = (),
    device: str | torch.device = "auto",
    force: bool = False,
) -> EditPlan:
    """Work out what :func:`edit_checkpoint` would do; writes nothing."""
    own = _OneByOne(factors, edit_device(device))
    checkpoint = open_weights(source, allow_globals)
    _warn_if_edited(checkpoint)
    layers = _Layers(editor, checkpoint, own, checkpoint.provenance)
    layers.check_origin({name: checkpoint.hash(name) for name in layers.names.values()}, force)
    report = layers.edit(lambda *_: None)
    total = sum(checkpoint.num_bytes(name) for name in checkpoint.shapes())
    return EditPlan(report, 2 * total, total, max(edit_bytes(*own.shapes[layer]) for layer in report.layers))


def open_to_edit(
    source: _Path,
    target: _Path,
    overwrite: bool = False,
    delta: _Path | None = None,
    allow_globals: Sequence[str] = (),
    to_hf: _Path | None = None,
) -> Checkpoint:
    """Open a checkpoint, having checked all paths of an edit; arguments and errors as :func:`edit_checkpoint`."""
    inputs = [source, *([] if to_hf is None else [to_hf])]
    check_outputs([target, *([] if delta is None else [delta])], inputs, overwrite)
    if delta is not None:
        check_safetensors_name(delta, "a delta")
    checkpoint = open_weights(source, allow_globals)
    if to_hf is None:
        check_name(target, checkpoint.format)
        return checkpoint
    _archive(checkpoint)
    if not (Path(to_hf) / "config.json").is_file():
        raise ValueError(
            f"{to_hf} has no config.json; name the folder of the model that the checkpoint was made from (to_hf)."
        )
    check_name(target, "folder")
    return checkpoint


def _archive(checkpoint: Checkpoint) -> ArchiveFile:
    if not isinstance(checkpoint, ArchiveFile):
        raise ValueError(
            f"{checkpoint.path} is no file of torch.save (.ckpt, .pt): only those become a folder (to_hf, --to-hf)."
        )
    return checkpoint


def _warn_if_edited(checkpoint: Checkpoint) -> None:
    facts = checkpoint.provenance
    if facts is not None:
        layers = listing(facts.get("layers", []), 3)
        warnings.warn(
            f"{checkpoint.path} is edited already ({facts.get('method')}, layers {layers}); this edits the edited "
            "weights.",
            stacklevel=3,
        )


def check_origin(
    editor: WeightEditor, source: _Path, factors: KroneckerFactors, allow_globals: Sequence[str] = ()
) -> None:
    """Raise ``ValueError`` if an edit would be refused since the factors fit the checkpoint's names or weights not."""
    checkpoint = open_weights(source, allow_globals)
    layers = _Layers(editor, checkpoint, _OneByOne(factors, torch.device("cpu")), checkpoint.provenance)
    layers.check_origin({name: checkpoint.hash(name) for name in layers.names.values()}, force=False)


def edit_device(device: str | torch.device) -> torch.device:
    """Return the device that is meant; ``"auto"`` is the GPU if there is one, and the CPU otherwise.

    Raises:
        ValueError: If there is no such device, or it has no float64.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.zeros(1, dtype=torch.float64, device=found).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:  # each build of torch has its own
        raise ValueError(f"device={str(device)!r} cannot edit, which takes float64; use auto, cpu or cuda.") from error
    return found


class _OneByOne(KroneckerFactors):
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


class _Layers:
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
        self, editor: WeightEditor, checkpoint: Checkpoint, factors: _OneByOne, before: Mapping[str, Any] | None
    ) -> None:
        self.editor, self.checkpoint, self.factors = editor, checkpoint, factors
        self.energies = editor.plan(factors)
        self.names = match_layers(self.energies, checkpoint.shapes(), checkpoint.module_names)
        self._edited = self._edited_before(before)
        checkpoint.check_ties(self.names.values())

    def check_origin(self, hashes: Mapping[str, str], force: bool) -> None:
        """Raise ``ValueError`` if the factors were collected on other weights, unless forced, which warns.

        Layers that were edited already differ, and are passed over: that was told.

        Args:
            hashes: Hashes of the tensors.
            force: Whether to go on.
        """
        recorded, far = self.factors.fingerprints(), {}
        asked = [layer for layer in self.energies if layer in recorded and self.names[layer] not in self._edited]
        for layer in asked:
            name = self.names[layer]
            distance = difference(recorded[layer], hashes[name], lambda name=name: self.checkpoint.read(name))  # type: ignore[misc]
            if distance is not None:
                far[layer] = distance
        if not far:
            return
        furthest = max(far.values())
        how = (
            f"the furthest is {furthest:.2g} of its norm away, by a sample of its entries"
            if furthest
            else "few entries"
        )
        found = (
            f"{len(far)} of {len(asked)} layers of {self.checkpoint.path} have other weights than those that the "
            f"factors were collected on: {listing(far, 3)}; {how}."
        )
        if not force:
            raise ValueError(
                f"{found} Were they collected on another model? If this is a fine-tune of the model that they were "
                "collected on, and you mean to edit it with these factors, add --force (force=True)."
            )
        warnings.warn(found, stacklevel=3)

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


def _facts(
    editor: WeightEditor,
    factors: _OneByOne,
    source: str,
    report: EditReport,
    before: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return what the edited copy says about itself."""
    facts = editor.facts(factors, source)
    facts["layers"] = {
        layer: {**facts["layers"][layer], "relative_change": edit.relative_change}
        for layer, edit in report.layers.items()
    }
    if report.skipped:
        facts["skipped"] = dict(report.skipped)
    return facts if before is None else {**facts, "before": before}
