"""What a factor file, a delta or a checkpoint says about itself."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from lightning_curvature.checkpoints.deltas import read_header
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.checkpoints.safetensors import SafetensorsFile
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.factors.files import is_factor_file
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import ERRORS
from lightning_curvature.memory import size
from lightning_curvature.storage.outputs import DELTA

ENERGIES = (0.5, 0.9, 0.99)
"""Shares of the curvature mass of which a factor file's description says how few pairs hold them."""
_UNKNOWN = "not known"


def describe(path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> dict[str, Any]:
    """Return what a factor file holds, or what was edited in a checkpoint, as JSON values.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        ValueError: If it is neither a factor file nor a checkpoint.
    """
    if is_factor_file(path):
        return _describe_factors(path)
    checkpoint = open_checkpoint(path, allow_globals)
    shapes = checkpoint.shapes()
    if isinstance(checkpoint, SafetensorsFile) and DELTA in checkpoint.metadata:
        header = read_header(checkpoint)
        return {"path": str(path), "kind": "delta", "tensors": list(header["tensors"]), "edit": header["edit"]}
    return {
        "path": str(path),
        "kind": "checkpoint",
        "tensors": len(shapes),
        "bytes": sum(map(checkpoint.num_bytes, shapes)),
        "edit": checkpoint.edit_facts,
    }


def _describe_factors(path: str | os.PathLike[str]) -> dict[str, Any]:
    factors = KroneckerFactors.open(path)
    layers = {}
    for name, layer in factors.items():
        try:
            lam, mu = layer.basis.lam, layer.basis.mu
        except ValueError as error:
            raise ValueError(f"{path}, layer {name!r}: {error}") from error
        layers[name] = {
            "shape": list(layer.shape),
            "num_inputs": layer.num_inputs,
            "num_gradients": layer.num_gradients,
            "num_seen": layer.num_seen,
            "num_losses": layer.num_losses,
            "errors": layer.errors,
            "share_of_pairs": {
                str(energy): select_staircase(lam, mu, energy).kept / (len(lam) * len(mu)) for energy in ENERGIES
            },
        }
    return {
        "path": str(path),
        "kind": "factors",
        "sha256": factors.digest(),
        "provenance": factors.provenance,
        "layers": layers,
    }


def description(facts: Mapping[str, Any]) -> str:
    """Return what :func:`describe` returned, as text."""
    if facts["kind"] == "delta":
        return f"{facts['path']}: a delta of {len(facts['tensors'])} tensors, of the edit:\n{edit_table(facts['edit'])}"
    if facts["kind"] == "checkpoint":
        total = f"{facts['path']}: {facts['tensors']} tensors, {size(facts['bytes'])}"
        edit = facts["edit"]
        return f"{total}; not edited by this package." if edit is None else f"{total}; edited:\n{edit_table(edit)}"
    headers = ["layer", "weight", "positions", "error of A", "of G", "half of the mass in", "90 %", "99 %"]
    rows = [
        [
            name,
            "{} x {}".format(*layer["shape"]),
            layer["num_inputs"],
            *(f"{layer['errors'][key]:.1%}" if key in layer["errors"] else "" for key in ERRORS),
            *(f"{share:.2%}" for share in layer["share_of_pairs"].values()),
        ]
        for name, layer in facts["layers"].items()
    ]
    source = ", ".join(f"{key}={value}" for key, value in facts["provenance"].items())
    return f"K-FAC factors ({source})\nSHA-256 {facts['sha256']}\n{tabulate(rows, headers)}"


def edit_table(facts: Mapping[str, Any]) -> str:
    """Return what an edited checkpoint says about its edit and about earlier edits, as text."""
    source = ", ".join(f"{key}={value}" for key, value in facts.get("provenance", {}).items())
    headers = ["layer", "energy", "positions", "||W'-W||/||W||", "predicted loss"]
    rows = [
        [
            name,
            *(layer.get(key, _UNKNOWN) for key in ("energy", "positions")),
            _shown(layer.get("relative_change"), ".3f"),
            _shown(layer.get("predicted_loss"), ".2g"),
        ]
        for name, layer in facts.get("layers", {}).items()
    ]
    lines = [
        f"Method {facts.get('method', _UNKNOWN)}, by {facts.get('package', _UNKNOWN)}; factors: {source or _UNKNOWN}",
        tabulate(rows, headers, disable_numparse=True),
        *(f"Not edited: {reason}" for reason in dict(facts.get("skipped") or {}).values()),
        f"SHA-256 of the unedited weights {facts.get('source', _UNKNOWN)}",
        f"SHA-256 of the factors {facts.get('factors', _UNKNOWN)}",
    ]
    if isinstance(facts.get("reference"), Mapping):
        lines.insert(1, f"Edited is the update since {facts['reference'].get('name', _UNKNOWN)!r}.")
    if isinstance(facts.get("before"), Mapping):
        lines += ["Edited before:", edit_table(facts["before"])]
    return "\n".join(lines)


def _shown(number: Any, form: str) -> str:
    return format(number, form) if isinstance(number, (int, float)) else _UNKNOWN
