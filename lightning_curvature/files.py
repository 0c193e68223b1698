"""Edits of saved checkpoints, as a stream of tensors."""

import dataclasses
import os
import tempfile
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
from lightning_curvature.checkpoints.formats import (
    Checkpoint,
    content_hash,
    open_checkpoint,
    tensor_hashes,
)  # fmt: skip
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.checkpoints.outputs import check_outputs
from lightning_curvature.deltas import DeltaRecord
from lightning_curvature.editing import WeightEditor
from lightning_curvature.factors import KroneckerFactors, LayerFactors
from lightning_curvature.plan import edit_bytes, size
from lightning_curvature.report import EditReport, LayerEdit

_NOTHING = (
    "The edit would change nothing: every weight, rounded to its dtype, stays what it is. Choose a smaller energy."
)


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
    source: str | os.PathLike[str],
    factors: KroneckerFactors,
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    delta: str | os.PathLike[str] | None = None,
    allow_globals: Sequence[str] = (),
    to_hf: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
) -> EditReport:
    """Write an edited copy of a checkpoint in the same format; everything that is not edited stays byte-identical.

    Args:
        editor: Edits the weights.
        source: Hugging Face folder, ``.safetensors`` file, Lightning checkpoint, or state dict of ``torch.save``.
        factors: Factors of its layers; names are matched by rule, see :mod:`lightning_curvature.checkpoints.names`.
        target: File or folder to write, atomically.
        overwrite: Whether ``target`` may exist.
        delta: Also write a file that turns the copy into the source again, and the source into the copy.
        allow_globals: Classes that a file of ``torch.save`` may hold.
        to_hf: Write a Hugging Face folder instead, from a file of ``torch.save`` whose module holds a Hugging Face
            model: a folder with the model's ``config.json``, and a tokenizer and whatever else should be copied.
        device: Where layers are decomposed and edited, one at a time: ``"auto"``, the GPU if there is one, or a device.

    Returns:
        What was done.

    Raises:
        FileExistsError: If the target is the source, or exists.
        ValueError: If a layer finds no tensor, a shape does not fit, nothing would change, or the device cannot edit.
        RuntimeError: If a layer does not fit on the GPU.
    """
    own = _OneByOne(factors, edit_device(device))
    inputs = [source, *([] if to_hf is None else [to_hf])]
    check_outputs([target, *([] if delta is None else [delta])], inputs, overwrite)
    checkpoint = _open_to_edit(source, allow_globals)
    hashes = tensor_hashes(checkpoint.shapes(), checkpoint.read)
    facts = editor.facts(factors, content_hash(hashes))
    if checkpoint.provenance is not None:
        facts["before"] = checkpoint.provenance
    if to_hf is None:
        return _edit(editor, checkpoint, own, target, facts, delta, hashes)
    from lightning_curvature.checkpoints.conversion import to_folder  # transformers is imported by those who need it

    parent = Path(target).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".to_hf.", dir=parent) as scratch:
        folder = to_folder(checkpoint, to_hf, Path(scratch, "model"))
        hashes = tensor_hashes(folder.shapes(), folder.read)
        return _edit(editor, folder, own, target, facts, delta, hashes)


def _edit(
    editor: WeightEditor,
    checkpoint: Checkpoint,
    own: "_OneByOne",
    target: str | os.PathLike[str],
    facts: Mapping[str, Any],
    delta: str | os.PathLike[str] | None,
    hashes: Mapping[str, str],
) -> EditReport:
    energies = editor.plan(own.factors)
    names = match_layers(energies, checkpoint.shapes(), checkpoint.module_names)
    reports: dict[str, LayerEdit] = {}
    progress = tqdm(total=len(energies), unit="layer", desc="Editing", disable=None)
    with ExitStack() as stack:
        stack.enter_context(progress)
        record = None if delta is None else stack.enter_context(DeltaRecord(Path(delta), checkpoint, facts, hashes))

        def edit(layer: str) -> Callable[[Tensor], Tensor]:
            def edited(old: Tensor) -> Tensor:
                new, report = _edit_layer(editor, layer, old, own, energies[layer])
                reports[layer] = dataclasses.replace(report, tensor=names[layer])
                if record is not None:
                    record.add(names[layer], old, new)
                progress.update()
                if len(reports) == len(energies):
                    if not any(report.changed for report in reports.values()):
                        raise ValueError(_NOTHING)
                    if record is not None:
                        record.write()  # before the target appears: there is never an edited copy without its delta
                return new

            return edited

        checkpoint.copy(target, {names[layer]: edit(layer) for layer in energies}, facts)
        if record is not None:
            record.keep = True
    return EditReport({layer: reports[layer] for layer in energies}, editor.method, own.factors.provenance)


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


class _OneByOne:
    """Factors of one layer after the other: an eigenbasis goes with its layer, or with the last in a row that share A.

    Args:
        factors: The factors.
        device: Where the layer's are.
    """

    def __init__(self, factors: KroneckerFactors, device: torch.device) -> None:
        self.factors = factors
        self.device = device
        self._A: tuple[Tensor, Tensor] | None = None

    def __call__(self, name: str) -> LayerFactors:
        """Return the factors of a layer, as tensors of their own: what is worked out from them goes with these."""
        found = self.factors[name]
        if self._A is None or self._A[0] is not found.A:
            self._A = found.A, found.A.detach().to(self.device)
        here: dict[str, Any] = {
            key: tensor.detach().to(self.device) for key, tensor in found.tensors.items() if key != "A"
        }
        return dataclasses.replace(found, A=self._A[1], **here)


def _edit_layer(
    editor: WeightEditor, layer: str, weight: Tensor, own: _OneByOne, energy: float
) -> tuple[Tensor, LayerEdit]:
    try:
        factors = own(layer)
        return editor.edit_weight(layer, weight, factors, energy, factors.transposed)
    except torch.cuda.OutOfMemoryError as error:
        raise RuntimeError(
            f"Layer {layer!r}: editing it takes about {size(edit_bytes(*own.factors[layer].shape))}, more than the GPU "
            "has left. Edit on the CPU (device='cpu', --device cpu), or free the GPU."
        ) from error


def plan_edit(
    editor: WeightEditor,
    source: str | os.PathLike[str],
    factors: KroneckerFactors,
    allow_globals: Sequence[str] = (),
    device: str | torch.device = "auto",
) -> EditPlan:
    """Work out what :func:`edit_checkpoint` would do; writes nothing."""
    checkpoint = _open_to_edit(source, allow_globals)
    energies = editor.plan(factors)
    names = match_layers(energies, checkpoint.shapes(), checkpoint.module_names)
    reports, own = {}, _OneByOne(factors, edit_device(device))
    for layer, energy in energies.items():
        report = _edit_layer(editor, layer, checkpoint.read(names[layer]), own, energy)[1]
        reports[layer] = dataclasses.replace(report, tensor=names[layer])
    if not any(report.changed for report in reports.values()):
        raise ValueError(_NOTHING)
    total = sum(checkpoint.num_bytes(name) for name in checkpoint.shapes())
    return EditPlan(
        EditReport(reports, editor.method, factors.provenance),
        2 * total,
        total,
        max(edit_bytes(*factors[layer].shape) for layer in energies),
    )


def _open_to_edit(source: str | os.PathLike[str], allow_globals: Sequence[str]) -> Checkpoint:
    checkpoint = open_checkpoint(source, allow_globals)
    if checkpoint.provenance is not None:
        warnings.warn(
            f"{source} is edited already ({checkpoint.provenance.get('method')}, layers "
            f"{listing(checkpoint.provenance.get('layers', []), 3)}); this edits the edited weights.",
            stacklevel=3,
        )
    return checkpoint
