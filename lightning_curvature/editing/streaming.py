"""Edits of saved checkpoints, one tensor in memory at a time."""

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.deltas import DeltaRecord
from lightning_curvature.checkpoints.opening import open_weights
from lightning_curvature.editing.adapter_layers import layers_to_edit
from lightning_curvature.editing.file_layers import FileLayers, LayerEditor, StreamedFactors
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.basis_cache import BASES, bases_in
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.memory import edit_bytes, size
from lightning_curvature.storage.hashes import content_hash
from lightning_curvature.storage.outputs import check_name, check_outputs, check_safetensors_name
from lightning_curvature.storage.scratch import Scratch

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class EditPlan:
    """What an edit of a checkpoint would do.

    Args:
        report: The report that the edit would return.
        bytes_read: Bytes to read: the whole checkpoint twice, for its hash and for the copy.
        bytes_written: Bytes of the whole checkpoint.
        peak_bytes: Memory that the largest layer needs, see :func:`lightning_curvature.memory.edit_bytes`.
    """

    report: EditReport
    bytes_read: int
    bytes_written: int
    peak_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.report}\n{matches(self.report)}\nTo read: {size(self.bytes_read)}; to write: "
            f"{size(self.bytes_written)}; memory for the largest layer: {size(self.peak_bytes)}.",
            self.report.warning,
        ]
        return "\n".join(line for line in lines if line)


def matches(report: EditReport) -> str:
    """Return a line for each layer with the tensor that it was matched with."""
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
        source: Hugging Face folder, folder of a LoRA adapter, ``.safetensors`` file, Lightning checkpoint, or state
            dict of ``torch.save``.
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
        The report. A layer whose factors rest on too few positions is left as it is, with a warning.

    Raises:
        FileExistsError: If the target is the source, or exists.
        ValueError: If a layer finds no tensor, a shape does not fit, nothing would change, the device cannot edit, a
            name is one of another format, or the factors were collected on other weights.
        RuntimeError: If a layer does not fit on the GPU.
    """
    streamed = StreamedFactors(factors, edit_device(device))
    checkpoint = open_to_edit(source, target, overwrite, delta, allow_globals, to_hf)
    _warn_if_edited(checkpoint)
    with ExitStack() as stack:
        scratch = stack.enter_context(Scratch(Path(target)))
        if editor.is_joint and not BASES.folders:  # each layer is decomposed before any is edited
            stack.enter_context(bases_in(scratch.path / "bases"))
        layers, hashes, source_hash = _match_and_hash(editor, checkpoint, streamed, to_hf, scratch.path / "model")
        layers.check_origin(source, hashes, force)
        record = None if delta is None else stack.enter_context(DeltaRecord(Path(delta), layers.checkpoint, hashes))
        new = _edit_into(scratch, layers, record)
        report = layers.finish()
        facts = layers.editor.facts(streamed, source_hash, report)
        if layers.before is not None:
            facts["before"] = layers.before
        if record is not None:
            record.write(facts)  # before the target appears: there is never an edited copy without its delta
        layers.checkpoint.copy(target, new, facts)
        if record is not None:
            record.keep = True
    return report


def _match_and_hash(
    editor: LayerEditor, checkpoint: Checkpoint, factors: StreamedFactors, to_hf: _Path | None, folder: Path
) -> tuple[FileLayers, dict[str, str], str]:
    """Match the layers with the tensors of a checkpoint, or of a folder that is made from it, and hash the tensors.

    Args:
        editor: As in :func:`edit_checkpoint`.
        checkpoint: The source.
        factors: The factors.
        to_hf: As in :func:`edit_checkpoint`.
        folder: Where a Hugging Face folder is made.

    Returns:
        The layers, the hashes of the tensors that they are among, and the hash of the source.
    """
    before = checkpoint.edit_facts
    if to_hf is None:
        layers = layers_to_edit(
            editor, checkpoint, factors, before
        )  # first, since hashing a large checkpoint takes long
        hashes = checkpoint.hashes()
        return layers, hashes, content_hash(hashes)
    from lightning_curvature.checkpoints.conversion import to_folder  # imports transformers

    source_hash = content_hash(checkpoint.hashes())
    converted = to_folder(_archive(checkpoint), to_hf, folder)
    return FileLayers(editor, converted, factors, before), converted.hashes(), source_hash


def _edit_into(scratch: Scratch, layers: FileLayers, record: DeltaRecord | None) -> dict[str, Callable[[], Tensor]]:
    """Edit all layers; return functions that read the new tensors from the scratch folder, by name."""
    readers = {}
    for name, old, new in chain(layers.edits(), layers.others()):
        readers[name] = scratch.keep(new)
        if record is not None:
            record.add(name, old, new)
        del old, new  # before the next layer is read
    return readers


def plan_edit(
    editor: LayerEditor,
    source: _Path,
    factors: KroneckerFactors,
    allow_globals: Sequence[str] = (),
    device: str | torch.device = "auto",
    force: bool = False,
) -> EditPlan:
    """Return what :func:`edit_checkpoint` would do with the same arguments; nothing is written."""
    streamed = StreamedFactors(factors, edit_device(device))
    checkpoint = open_weights(source, allow_globals)
    _warn_if_edited(checkpoint)
    layers = layers_to_edit(editor, checkpoint, streamed, checkpoint.edit_facts)
    layers.check_origin(source, {name: checkpoint.hash(name) for name in layers.names.values()}, force)
    for edited in chain(layers.edits(), layers.others()):
        del edited  # before the next layer is read
    report = layers.finish()
    total = sum(checkpoint.num_bytes(name) for name in checkpoint.shapes())
    return EditPlan(report, 2 * total, total, max(edit_bytes(*streamed.shapes[layer]) for layer in report.layers))


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
    facts = checkpoint.edit_facts
    if facts is not None:
        layers = listing(facts.get("layers", []), 3)
        warnings.warn(
            f"{checkpoint.path} is edited already ({facts.get('method')}, layers {layers}); this edits the edited "
            "weights.",
            stacklevel=3,
        )


def check_origin_of_file(
    editor: LayerEditor, source: _Path, factors: KroneckerFactors, allow_globals: Sequence[str] = ()
) -> None:
    """Raise ``ValueError`` if an edit would be refused because the factors were collected on other weights.

    Factors that do not fit the checkpoint at all are passed over: loading the model raises an error of its own.
    """
    editor.energies(factors)
    checkpoint = open_weights(source, allow_globals)
    try:
        layers = layers_to_edit(
            editor, checkpoint, StreamedFactors(factors, torch.device("cpu")), checkpoint.edit_facts
        )
    except ValueError:
        return
    layers.check_origin(source, {name: checkpoint.hash(name) for name in layers.names.values()}, force=False)


def edit_device(device: str | torch.device) -> torch.device:
    """Return a device by its name; ``"auto"`` is the GPU if there is one, and the CPU otherwise.

    Raises:
        ValueError: If there is no such device, or it has no float64.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        named = torch.device(device)
        torch.zeros(1, dtype=torch.float64, device=named).cpu()
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:  # each build of torch has its own
        raise ValueError(f"device={str(device)!r} cannot edit, which takes float64; use auto, cpu or cuda.") from error
    return named
