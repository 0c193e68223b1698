"""Edits of saved checkpoints, as a stream of tensors."""

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.deltas import DeltaRecord, open_weights
from lightning_curvature.checkpoints.names import plain
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.editing.base import LayerEditor
from lightning_curvature.editing.file_layers import FileLayers, OneByOne, refuse_others
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.fingerprints import difference
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.memory import edit_bytes, size
from lightning_curvature.storage.hashes import content_hash, tensor_hash
from lightning_curvature.storage.outputs import NOTE, check_name, check_outputs, check_safetensors_name
from lightning_curvature.storage.scratch import Scratch

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class EditPlan:
    """What an edit of a checkpoint would do.

    Args:
        report: Per layer, as after the edit.
        bytes_read: Bytes to read: the whole checkpoint twice, for its hash and for the copy.
        bytes_written: Bytes of the whole checkpoint.
        peak_bytes: Memory that the largest layer needs, see :func:`lightning_curvature.memory.edit_bytes`.
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
    editor: LayerEditor,
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
    own = OneByOne(factors, edit_device(device))
    checkpoint = open_to_edit(source, target, overwrite, delta, allow_globals, to_hf)
    _warn_if_edited(checkpoint)
    with ExitStack() as stack:
        scratch = stack.enter_context(Scratch(Path(target)))
        before = checkpoint.provenance
        if to_hf is None:
            layers = FileLayers(editor, checkpoint, own, before)  # what finds no tensor is told before all is hashed
            hashes = checkpoint.hashes()
            unedited = content_hash(hashes)
        else:
            from lightning_curvature.checkpoints.conversion import to_folder  # those who need it import transformers

            unedited = content_hash(checkpoint.hashes())
            checkpoint = to_folder(_archive(checkpoint), to_hf, scratch.path / "model")
            layers, hashes = FileLayers(editor, checkpoint, own, before), checkpoint.hashes()
        layers.check_origin(source, hashes, force)
        record = None if delta is None else stack.enter_context(DeltaRecord(Path(delta), checkpoint, hashes))
        new: dict[str, Callable[[], Tensor]] = {}

        def keep(name: str, old: Tensor, edited: Tensor) -> None:
            new[name] = scratch.keep(edited)
            if record is not None:
                record.add(name, old, edited)

        report = layers.edit(keep)
        facts = editor.facts(own, unedited, report)
        if before is not None:
            facts["before"] = before
        if record is not None:
            record.write(facts)  # before the target appears: there is never an edited copy without its delta
        checkpoint.copy(target, new, facts)
        if record is not None:
            record.keep = True
    return report


def plan_edit(
    editor: LayerEditor,
    source: _Path,
    factors: KroneckerFactors,
    allow_globals: Sequence[str] = (),
    device: str | torch.device = "auto",
    force: bool = False,
) -> EditPlan:
    """Work out what :func:`edit_checkpoint` would do; writes nothing."""
    own = OneByOne(factors, edit_device(device))
    checkpoint = open_weights(source, allow_globals)
    _warn_if_edited(checkpoint)
    layers = FileLayers(editor, checkpoint, own, checkpoint.provenance)
    layers.check_origin(source, {name: checkpoint.hash(name) for name in layers.names.values()}, force)
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
    editor: LayerEditor, source: _Path, factors: KroneckerFactors, allow_globals: Sequence[str] = ()
) -> None:
    """Raise ``ValueError`` if an edit would be refused since the factors were collected on other weights.

    Whether they fit the model at all is told by those who load it.
    """
    editor.energies(factors)
    checkpoint = open_weights(source, allow_globals)
    try:
        layers = FileLayers(editor, checkpoint, OneByOne(factors, torch.device("cpu")), checkpoint.provenance)
    except ValueError:
        return
    layers.check_origin(source, {name: checkpoint.hash(name) for name in layers.names.values()}, force=False)


def check_loaded(
    module: nn.Module,
    names: Mapping[str, str],
    factors: KroneckerFactors,
    source: _Path,
    *,
    force: bool = False,
    allow_globals: Sequence[str] = (),
) -> None:
    """Raise ``ValueError`` if factors were collected on other weights than a module has; if forced, warn.

    Of layers that an edit of this package changed, there is a warning alone.

    Args:
        module: The network.
        names: The module's own name of each layer to compare.
        factors: The factors.
        source: Where the module's weights come from, a file or a folder.
        force: Whether to go on.
        allow_globals: Classes that a file of ``torch.save`` may hold.
    """
    recorded, far = factors.fingerprints(), dict[str, float]()
    asked = [layer for layer in names if layer in recorded]
    for layer in asked:
        weight = module.get_parameter(f"{names[layer]}.weight").detach()
        distance = difference(recorded[layer], tensor_hash(weight), weight.clone)
        if distance is not None:
            far[layer] = distance
    if not far:
        return
    edited = _edited_layers(source, far, allow_globals)
    if edited:
        warnings.warn(
            f"{source} is an edited copy: the factors describe its layers {listing(edited, 3)} as they were before.",
            stacklevel=3,
        )
    if others := {layer: distance for layer, distance in far.items() if layer not in edited}:
        refuse_others(others, len(asked), source, force)


def _edited_layers(source: _Path, layers: Collection[str], allow_globals: Sequence[str]) -> list[str]:
    """Return those of some layers that earlier edits of a checkpoint changed."""
    if Path(source).is_dir() and not (Path(source) / NOTE).is_file():
        return []  # edits leave a note in a folder, whatever format its weights have
    before: Any = open_checkpoint(source, allow_globals).provenance
    edited: set[str] = set()
    while isinstance(before, Mapping):
        edited |= {plain(layer) for layer in before.get("layers", {})}
        before = before.get("before")
    own = {layer: plain(layer) for layer in layers}
    return [
        layer
        for layer in layers
        if any(
            own[layer] == name or own[layer].endswith(f".{name}") or name.endswith(f".{own[layer]}") for name in edited
        )
    ]


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
