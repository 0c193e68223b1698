"""Edits of saved checkpoints, as a stream of tensors, and the deltas that take them back."""

import dataclasses
import hashlib
import json
import os
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

from lightning_curvature._checks import listing
from lightning_curvature.basis import select_staircase
from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.checkpoints.formats import content_hash, open_checkpoint
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.checkpoints.safetensors import as_bytes
from lightning_curvature.editor import EditReport, LayerEdit, WeightEditor
from lightning_curvature.factors import KroneckerFactors, is_factor_file
from lightning_curvature.plan import size

DELTA = "lightning_curvature.delta"
"""Metadata entry of a delta file, JSON."""


@dataclass(frozen=True)
class EditPlan:
    """What an edit of a checkpoint would do.

    Args:
        report: Per layer, as after the edit.
        tensors: Name of the tensor of each layer.
        bytes_read: Bytes of the tensors to edit.
        bytes_written: Bytes of the whole checkpoint.
        peak_bytes: Memory that the largest layer needs: its weight and factors in float64, bases and products.
    """

    report: EditReport
    tensors: Mapping[str, str]
    bytes_read: int
    bytes_written: int
    peak_bytes: int

    def __str__(self) -> str:
        where = "\n".join(f"  {layer} -> {name}" for layer, name in self.tensors.items())
        return (
            f"{self.report}\nTensors:\n{where}\nTo read for the edit: {size(self.bytes_read)}; to write: "
            f"{size(self.bytes_written)}; memory for the largest layer: {size(self.peak_bytes)}."
        )


def edit_checkpoint(
    editor: WeightEditor,
    source: str | os.PathLike[str],
    factors: KroneckerFactors,
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    delta: str | os.PathLike[str] | None = None,
    allow_globals: Sequence[str] = (),
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
    energies, names = editor.plan(factors), match_layers(editor.plan(factors), checkpoint.shapes())
    reports: dict[str, LayerEdit] = {}
    deltas: dict[str, Tensor] = {}
    hashes: dict[str, dict[str, str]] = {}

    def edit(layer: str) -> Callable[[Tensor], Tensor]:
        def edited(old: Tensor) -> Tensor:
            transposed = factors[layer].transposed
            # A copy of the factors: their cached basis goes when the layer is done.
            own = dataclasses.replace(factors[layer])
            new, reports[layer] = editor.edit_weight(layer, old, own, energies[layer], transposed)
            if delta is not None:
                deltas[names[layer]] = _bits(old) ^ _bits(new)
                hashes[names[layer]] = {"original": _hash(old), "edited": _hash(new)}
            return new

        return edited

    facts = editor.facts(factors, content_hash(checkpoint.shapes(), checkpoint.read))
    if all(energy == 1.0 for energy in energies.values()):
        raise ValueError("The edit would change nothing: every layer keeps all of its energy. Choose one below 1.")
    checkpoint.copy(target, {names[layer]: edit(layer) for layer in energies}, facts)
    if delta is not None:
        header = {"version": 1, "tensors": hashes, "edit": facts, "before": checkpoint.provenance,
                  "headers": checkpoint.headers()}  # fmt: skip
        with replacing(delta) as temporary:
            save_file(deltas, temporary, metadata={DELTA: json.dumps(header)})
    return EditReport(reports, editor.method, factors.provenance)


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
        names = match_layers([name.removesuffix(".weight") for name in header["tensors"]], checkpoint.shapes())
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
    names = match_layers(energies, checkpoint.shapes())
    reports = {
        layer: editor.edit_weight(
            layer, checkpoint.read(names[layer]), factors[layer], energy, factors[layer].transposed
        )[1]
        for layer, energy in energies.items()
    }
    return EditPlan(
        EditReport(reports, editor.method, factors.provenance),
        names,
        sum(checkpoint.num_bytes(name) for name in names.values()),
        sum(checkpoint.num_bytes(name) for name in checkpoint.shapes()),
        max(
            8 * 3 * (d_out**2 + d_in**2 + d_out * d_in) for d_out, d_in in (factors[layer].shape for layer in energies)
        ),
    )


def describe(path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> str:
    """Return what a factor file holds, or what was edited in a checkpoint, as text.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is neither.
    """
    if Path(path).suffix == ".safetensors" and is_factor_file(path):
        factors = KroneckerFactors.load(path)
        headers = ["layer", "weight", "positions", "half of the mass in", "90 %", "99 %"]
        rows = []
        for name, layer in factors.items():
            lam, mu = layer.basis.lam, layer.basis.mu
            kept = [select_staircase(lam, mu, energy).kept / (len(lam) * len(mu)) for energy in (0.5, 0.9, 0.99)]
            rows.append([name, f"{len(lam)} x {len(mu)}", layer.num_inputs, *(f"{share:.2%}" for share in kept)])
        source = ", ".join(f"{key}={value}" for key, value in factors.provenance.items())
        return f"K-FAC factors ({source})\nSHA-256 {factors.digest()}\n{tabulate(rows, headers)}"
    checkpoint = open_checkpoint(path, allow_globals)
    shapes = checkpoint.shapes()
    total = f"{len(shapes)} tensors, {size(sum(map(checkpoint.num_bytes, shapes)))}"
    if checkpoint.provenance is None:
        return f"{path}: {total}; not edited by this package."
    return f"{path}: {total}; edited:\n{json.dumps(checkpoint.provenance, indent=2)}"


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
