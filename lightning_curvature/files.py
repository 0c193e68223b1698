"""Edits of saved checkpoints, as a stream of tensors, and the deltas that take them back."""

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from lightning_curvature._checks import listing
from lightning_curvature.basis import select_staircase
from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.checkpoints.formats import Checkpoint, content_hash, open_checkpoint
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.checkpoints.safetensors import as_bytes
from lightning_curvature.editor import WeightEditor
from lightning_curvature.factors import KroneckerFactors, LayerFactors, is_factor_file
from lightning_curvature.plan import size
from lightning_curvature.report import EditReport, LayerEdit

DELTA = "lightning_curvature.delta"
"""Metadata entry of a delta file, JSON."""


@dataclass(frozen=True)
class EditPlan:
    """What an edit of a checkpoint would do.

    Args:
        report: Per layer, as after the edit.
        bytes_read: Bytes of the tensors to edit.
        bytes_written: Bytes of the whole checkpoint.
        peak_bytes: Memory that the largest layer needs, see :func:`edit_bytes`.
    """

    report: EditReport
    bytes_read: int
    bytes_written: int
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.report}\n{matches(self.report)}\nTo read for the edit: {size(self.bytes_read)}; to write: "
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
    _check_target(source, target, overwrite)
    checkpoint = open_checkpoint(source, allow_globals)
    if checkpoint.provenance is not None:
        warnings.warn(
            f"{source} is edited already ({checkpoint.provenance.get('method')}, layers "
            f"{listing(checkpoint.provenance.get('layers', []), 3)}); this edits the edited weights.",
            stacklevel=2,
        )
    facts = editor.facts(factors, content_hash(checkpoint.shapes(), checkpoint.read))
    if to_hf is None:
        return _edit(editor, checkpoint, factors, target, facts, delta)
    from lightning_curvature.checkpoints.conversion import to_folder  # transformers is imported by those who need it

    parent = Path(target).parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".to_hf.", dir=parent) as scratch:
        folder = to_folder(checkpoint, to_hf, Path(scratch, "model"))
        return _edit(editor, folder, factors, target, facts, delta)


def _edit(
    editor: WeightEditor,
    checkpoint: Checkpoint,
    factors: KroneckerFactors,
    target: str | os.PathLike[str],
    facts: Mapping[str, Any],
    delta: str | os.PathLike[str] | None,
) -> EditReport:
    energies = editor.plan(factors)
    names = match_layers(energies, checkpoint.shapes(), checkpoint.module_names)
    reports: dict[str, LayerEdit] = {}
    deltas: dict[str, Tensor] = {}
    hashes: dict[str, dict[str, str]] = {}
    progress = tqdm(total=len(energies), unit="layer", desc="Editing", disable=None)

    def edit(layer: str) -> Callable[[Tensor], Tensor]:
        def edited(old: Tensor) -> Tensor:
            # A copy of the factors: their cached basis goes when the layer is done.
            new, report = _edit_layer(editor, layer, old, dataclasses.replace(factors[layer]), energies[layer])
            reports[layer] = dataclasses.replace(report, tensor=names[layer])
            if delta is not None:
                deltas[names[layer]] = _bits(old) ^ _bits(new)
                hashes[names[layer]] = {"original": _hash(old), "edited": _hash(new)}
            progress.update()
            if len(reports) == len(energies) and not any(report.changed for report in reports.values()):
                raise ValueError(
                    "The edit would change nothing: every weight, rounded to its dtype, stays what it is. Choose a "
                    "smaller energy."
                )
            return new

        return edited

    with progress:
        checkpoint.copy(target, {names[layer]: edit(layer) for layer in energies}, facts)
    if delta is not None:
        header = {"version": 1, "tensors": hashes, "edit": facts, "before": checkpoint.provenance,
                  "headers": checkpoint.headers()}  # fmt: skip
        with replacing(delta) as temporary:
            save_file(deltas, temporary, metadata={DELTA: json.dumps(header)})
    return EditReport({layer: reports[layer] for layer in energies}, editor.method, factors.provenance)


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
    _check_target(source, target, overwrite)
    checkpoint = open_checkpoint(source, allow_globals)
    with safe_open(delta, framework="pt") as file:
        metadata = file.metadata() or {}
        if DELTA not in metadata:
            raise ValueError(f"{delta} is no delta; it is written by edit with --save-delta.")
        header: dict[str, Any] = json.loads(metadata[DELTA])
        here, there = ("edited", "original") if revert else ("original", "edited")
        layers = [name.removesuffix(".weight") for name in header["tensors"]]
        names = match_layers(layers, checkpoint.shapes(), checkpoint.module_names)
        for layer, name in names.items():
            if _hash(checkpoint.read(name)) != header["tensors"][f"{layer}.weight"][here]:
                raise ValueError(
                    f"{name!r} in {source} is not the {here} tensor that {delta} belongs to. "
                    f"{'Is it the checkpoint before the edit, or edited again?' if revert else 'Is it another model?'}"
                )

        def flip(layer: str) -> Callable[[Tensor], Tensor]:
            def flipped(old: Tensor) -> Tensor:
                bits: Tensor = _bits(old) ^ file.get_tensor(f"{layer}.weight")
                new = bits.view(old.dtype).view(old.shape)
                if _hash(new) != header["tensors"][f"{layer}.weight"][there]:
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
    checkpoint = open_checkpoint(source, allow_globals)
    energies = editor.plan(factors)
    names = match_layers(energies, checkpoint.shapes(), checkpoint.module_names)
    reports = {}
    for layer, energy in energies.items():
        own = dataclasses.replace(factors[layer])
        report = _edit_layer(editor, layer, checkpoint.read(names[layer]), own, energy)[1]
        reports[layer] = dataclasses.replace(report, tensor=names[layer])
    return EditPlan(
        EditReport(reports, editor.method, factors.provenance),
        sum(checkpoint.num_bytes(name) for name in names.values()),
        sum(checkpoint.num_bytes(name) for name in checkpoint.shapes()),
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
    return {
        "path": str(path),
        "kind": "checkpoint",
        "tensors": len(shapes),
        "bytes": sum(map(checkpoint.num_bytes, shapes)),
        "edit": checkpoint.provenance,
    }


def description(found: Mapping[str, Any]) -> str:
    """Return what :func:`describe` returned, as text."""
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


def _check_target(source: str | os.PathLike[str], target: str | os.PathLike[str], overwrite: bool) -> None:
    if Path(source).resolve() == Path(target).resolve():
        raise FileExistsError(
            f"{target} is the source itself. Write to another path; the original is what you can go back to."
        )
    if Path(target).exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another path, or --overwrite it.")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(as_bytes(tensor)).hexdigest()
