"""Edits of saved checkpoints, as a stream of tensors, and the deltas that take them back."""

import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from lightning_curvature._checks import listing
from lightning_curvature.basis import select_staircase
from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.checkpoints.formats import (
    Checkpoint,
    content_hash,
    open_checkpoint,
    tensor_hash,
    tensor_hashes,
    values_hash,
)  # fmt: skip
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.checkpoints.safetensors import SafetensorsFile
from lightning_curvature.editor import WeightEditor
from lightning_curvature.factors import KroneckerFactors, LayerFactors, is_factor_file
from lightning_curvature.plan import size
from lightning_curvature.report import EditReport, LayerEdit

DELTA = "lightning_curvature.delta"
"""Metadata entry of a delta file, JSON."""
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
        peak_bytes: Memory that the largest layer needs, see :func:`edit_bytes`.
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

    Returns:
        What was done.

    Raises:
        FileExistsError: If the target is the source, or exists.
        ValueError: If a layer finds no tensor, a shape does not fit, or nothing would change.
    """
    inputs = [source, *([] if to_hf is None else [to_hf])]
    check_outputs([target, *([] if delta is None else [delta])], inputs, overwrite)
    checkpoint = _open_to_edit(source, allow_globals)
    hashes = tensor_hashes(checkpoint.shapes(), checkpoint.read)
    facts = editor.facts(factors, content_hash(hashes))
    if checkpoint.provenance is not None:
        facts["before"] = checkpoint.provenance
    if to_hf is None:
        return _edit(editor, checkpoint, factors, target, facts, delta, hashes)
    from lightning_curvature.checkpoints.conversion import to_folder  # transformers is imported by those who need it

    parent = Path(target).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".to_hf.", dir=parent) as scratch:
        folder = to_folder(checkpoint, to_hf, Path(scratch, "model"))
        hashes = tensor_hashes(folder.shapes(), folder.read)
        return _edit(editor, folder, factors, target, facts, delta, hashes)


def _edit(
    editor: WeightEditor,
    checkpoint: Checkpoint,
    factors: KroneckerFactors,
    target: str | os.PathLike[str],
    facts: Mapping[str, Any],
    delta: str | os.PathLike[str] | None,
    hashes: Mapping[str, str],
) -> EditReport:
    energies = editor.plan(factors)
    names = match_layers(energies, checkpoint.shapes(), checkpoint.module_names)
    reports: dict[str, LayerEdit] = {}
    progress = tqdm(total=len(energies), unit="layer", desc="Editing", disable=None)
    with ExitStack() as stack:
        stack.enter_context(progress)
        record = None if delta is None else stack.enter_context(_DeltaRecord(Path(delta), checkpoint, facts, hashes))

        def edit(layer: str) -> Callable[[Tensor], Tensor]:
            def edited(old: Tensor) -> Tensor:
                # A copy of the factors: their cached basis goes when the layer is done.
                new, report = _edit_layer(editor, layer, old, dataclasses.replace(factors[layer]), energies[layer])
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
    return EditReport({layer: reports[layer] for layer in energies}, editor.method, factors.provenance)


class _DeltaRecord(AbstractContextManager["_DeltaRecord"]):
    """Collects a delta in files, one tensor in memory at a time; it is taken back unless ``keep`` is set.

    Args:
        path: File to write.
        checkpoint: The original.
        facts: What the edited copy says about itself.
        hashes: Hashes of all tensors of the original.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, facts: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.checkpoint, self.facts = path, checkpoint, facts
        self.scratch = tempfile.TemporaryDirectory(prefix=".delta.", dir=path.parent)
        self.original, self.edited = dict(hashes), dict(hashes)
        self.names: list[str] = []
        self.written = self.keep = False

    def add(self, name: str, old: Tensor, new: Tensor) -> None:
        """Take the difference of the bits of one tensor."""
        save_file({"delta": _bits(old) ^ _bits(new)}, Path(self.scratch.name, str(len(self.names))))
        self.names.append(name)
        self.edited[name] = tensor_hash(new)

    def write(self) -> None:
        """Write the file."""
        tensors = {name: load_file(Path(self.scratch.name, str(i)))["delta"] for i, name in enumerate(self.names)}
        header = {
            "version": 1,
            "tensors": {name: {"original": self.original[name], "edited": self.edited[name]} for name in self.names},
            "values": {"original": values_hash(self.original), "edited": values_hash(self.edited)},
            "edit": self.facts,
            "before": self.checkpoint.provenance,
            "headers": self.checkpoint.headers(),
        }
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={DELTA: json.dumps(header)})
        self.written = True

    def __exit__(self, *exception: object) -> None:
        """Remove what is not needed."""
        self.scratch.cleanup()
        if self.written and not self.keep:
            self.path.unlink()


def _edit_layer(
    editor: WeightEditor, layer: str, weight: Tensor, factors: LayerFactors, energy: float
) -> tuple[Tensor, LayerEdit]:
    return editor.edit_weight(layer, weight, factors, energy, factors.transposed)


def apply_delta(
    source: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    revert: bool,
    overwrite: bool = False,
    allow_globals: Sequence[str] = (),
) -> None:
    """Write the original of an edited checkpoint (``revert``), or the edited one of an original.

    Every changed tensor is verified by its hash, before and after.

    Args:
        source: Checkpoint, of any format.
        delta: File written by :func:`edit_checkpoint`.
        target: File or folder to write, atomically.
        revert: Take the edit back, rather than make it.
        overwrite: Whether ``target`` may exist.
        allow_globals: Classes that a file of ``torch.save`` may hold.

    Raises:
        FileExistsError: If the target is the source, or exists.
        ValueError: If the delta belongs to another checkpoint.
    """
    check_outputs([target], [source, delta], overwrite)
    checkpoint = open_checkpoint(source, allow_globals)
    with safe_open(delta, framework="pt") as file:
        metadata = file.metadata() or {}
        if DELTA not in metadata:
            raise ValueError(f"{delta} is no delta; it is written by edit with --save-delta.")
        header: dict[str, Any] = json.loads(metadata[DELTA])
        here, there = ("edited", "original") if revert else ("original", "edited")
        layers = [name.removesuffix(".weight") for name in header["tensors"]]
        names = match_layers(layers, checkpoint.shapes(), checkpoint.module_names)
        hashes = tensor_hashes(checkpoint.shapes(), checkpoint.read)
        for layer, name in names.items():
            expected = header["tensors"][f"{layer}.weight"]
            if hashes[name] != expected[here]:
                raise ValueError(
                    f"{name!r} in {source} is not the {here} tensor that {delta} belongs to. "
                    f"{'Is it the checkpoint before the edit, or edited again?' if revert else 'Is it another model?'}"
                )
        replaced = {expected[here]: expected[there] for expected in header["tensors"].values()}
        after = {name: replaced.get(value, value) for name, value in hashes.items()}
        if values_hash(after) != header["values"][there]:
            raise ValueError(
                f"{source} differs from the {here} checkpoint that {delta} belongs to, also in tensors that the edit "
                "left alone: it was changed or edited again since. "
                + ("Take back the later edit first." if revert else "Is it another model?")
            )

        def flip(layer: str) -> Callable[[Tensor], Tensor]:
            def flipped(old: Tensor) -> Tensor:
                bits: Tensor = _bits(old) ^ file.get_tensor(f"{layer}.weight")
                new = bits.view(old.dtype).view(old.shape)
                if tensor_hash(new) != header["tensors"][f"{layer}.weight"][there]:
                    raise ValueError(f"{delta} is damaged: {layer!r} does not become the {there} tensor.")
                return new

            return flipped

        facts = header["before"] if revert else header["edit"]
        headers = header["headers"] if revert else None
        checkpoint.copy(target, {name: flip(layer) for layer, name in names.items()}, facts, headers)


def plan_edit(
    editor: WeightEditor,
    source: str | os.PathLike[str],
    factors: KroneckerFactors,
    allow_globals: Sequence[str] = (),
) -> EditPlan:
    """Work out what :func:`edit_checkpoint` would do; writes nothing."""
    checkpoint = _open_to_edit(source, allow_globals)
    energies = editor.plan(factors)
    names = match_layers(energies, checkpoint.shapes(), checkpoint.module_names)
    reports = {}
    for layer, energy in energies.items():
        own = dataclasses.replace(factors[layer])
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


def edit_bytes(d_out: int, d_in: int) -> int:
    """Return the bytes that editing one layer takes: the larger of decomposing a factor and projecting the weight.

    All in float64. An eigendecomposition of ``[d, d]`` holds at most the matrix, its vectors, a sorted copy and a
    workspace of twice its size, besides the basis that is done; a projection holds both bases and three arrays of the
    weight's size. ``benchmarks/bench_edit_files.py`` measures 0.8 to 1.0 times this.
    """
    small, large = sorted((d_out, d_in))
    return 8 * max(small**2 + 5 * large**2, small**2 + large**2 + 3 * small * large)


def describe(path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a factor file holds, or what was edited in a checkpoint, as JSON values.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is neither.
    """
    if Path(path).suffix == ".safetensors" and is_factor_file(path):
        factors = KroneckerFactors.load(path)
        layers = {}
        for name, layer in factors.items():
            lam, mu = layer.basis.lam, layer.basis.mu
            layers[name] = {
                "shape": list(layer.shape),
                "num_inputs": layer.num_inputs,
                "num_gradients": layer.num_gradients,
                "num_seen": layer.num_seen,
                "share_of_pairs": {
                    str(energy): select_staircase(lam, mu, energy).kept / (len(lam) * len(mu))
                    for energy in (0.5, 0.9, 0.99)
                },
            }
        return {"path": str(path), "kind": "factors", "sha256": factors.digest(), "provenance": factors.provenance,
                "layers": layers}  # fmt: skip
    checkpoint = open_checkpoint(path, allow_globals)
    shapes = checkpoint.shapes()
    if isinstance(checkpoint, SafetensorsFile) and DELTA in checkpoint.metadata:
        header = json.loads(checkpoint.metadata[DELTA])
        return {"path": str(path), "kind": "delta", "tensors": list(header["tensors"]), "edit": header["edit"]}
    return {
        "path": str(path),
        "kind": "checkpoint",
        "tensors": len(shapes),
        "bytes": sum(map(checkpoint.num_bytes, shapes)),
        "edit": checkpoint.provenance,
    }


def description(found: Mapping[str, Any]) -> str:
    """Return what :func:`describe` returned, as text."""
    if found["kind"] == "delta":
        edit = json.dumps(found["edit"], indent=2)
        return f"{found['path']}: a delta of {len(found['tensors'])} tensors, of the edit:\n{edit}"
    if found["kind"] == "checkpoint":
        total = f"{found['path']}: {found['tensors']} tensors, {size(found['bytes'])}"
        edit = found["edit"]
        return (
            f"{total}; not edited by this package."
            if edit is None
            else f"{total}; edited:\n{json.dumps(edit, indent=2)}"
        )
    headers = ["layer", "weight", "positions", "half of the mass in", "90 %", "99 %"]
    rows = [
        [name, "{} x {}".format(*layer["shape"]), layer["num_inputs"],
         *(f"{share:.2%}" for share in layer["share_of_pairs"].values())]
        for name, layer in found["layers"].items()
    ]  # fmt: skip
    source = ", ".join(f"{key}={value}" for key, value in found["provenance"].items())
    return f"K-FAC factors ({source})\nSHA-256 {found['sha256']}\n{tabulate(rows, headers)}"


def check_outputs(
    outputs: Sequence[str | os.PathLike[str]], inputs: Sequence[str | os.PathLike[str]], overwrite: bool
) -> None:
    """Raise ``FileExistsError`` if an output would replace or contain an input, another output, or an existing file.

    Args:
        outputs: Files and folders to write.
        inputs: Files and folders that are read.
        overwrite: Whether outputs may exist.
    """
    resolved = [Path(path).resolve() for path in outputs]
    for output, path in zip(outputs, resolved, strict=True):
        for other in inputs:
            own = Path(other).resolve()
            if path == own:
                raise FileExistsError(
                    f"{output} is the source itself, or another file that is read. Write to another path; the original "
                    "is what you can go back to."
                )
            if path.is_relative_to(own) or own.is_relative_to(path):
                raise FileExistsError(f"{output} and {other} lie one inside the other. Write to another path.")
        if resolved.count(path) > 1:
            raise FileExistsError(f"{output} is named twice among the files to write.")
        if path.exists() and not overwrite:
            raise FileExistsError(f"{output} exists. Choose another path, or --overwrite it.")


def _open_to_edit(source: str | os.PathLike[str], allow_globals: Sequence[str]) -> Checkpoint:
    checkpoint = open_checkpoint(source, allow_globals)
    if checkpoint.provenance is not None:
        warnings.warn(
            f"{source} is edited already ({checkpoint.provenance.get('method')}, layers "
            f"{listing(checkpoint.provenance.get('layers', []), 3)}); this edits the edited weights.",
            stacklevel=3,
        )
    return checkpoint


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
