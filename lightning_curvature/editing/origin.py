"""Whether the weights to edit are those that the factors were collected on."""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.names import plain
from lightning_curvature.checkpoints.opening import open_checkpoint
from lightning_curvature.factors.fingerprints import difference
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.storage.hashes import tensor_hash
from lightning_curvature.storage.outputs import NOTE


def refuse_other_weights(
    distances: Mapping[str, float], num_compared: int, source: str | os.PathLike[str], force: bool
) -> None:
    """Raise ``ValueError`` because layers have other weights than their factors were collected on; if forced, warn.

    Args:
        distances: How far the weight of each such layer is from the one that the factors describe, see
            :func:`lightning_curvature.factors.fingerprints.difference`.
        num_compared: Number of layers that were compared.
        source: The checkpoint.
        force: Warn instead.
    """
    furthest = max(distances.values())
    how = f"the furthest is {furthest:.2g} of its norm away, by a sample of its entries" if furthest else "few entries"
    problem = (
        f"{len(distances)} of {num_compared} layers of {source} have other weights than those that the factors were "
        f"collected on: {listing(distances, 3)}; {how}."
    )
    if not force:
        raise ValueError(
            f"{problem} Were they collected on another model? If this is a fine-tune of the model that they were "
            "collected on, and you mean to use these factors, add --force (force=True)."
        )
    warnings.warn(problem, stacklevel=4)


def check_loaded(
    module: nn.Module,
    names: Mapping[str, str],
    factors: KroneckerFactors,
    source: str | os.PathLike[str],
    *,
    force: bool = False,
    allow_globals: Sequence[str] = (),
) -> None:
    """Raise ``ValueError`` if factors were collected on other weights than a module has; if forced, warn.

    Layers that an edit of this package changed only cause a warning.

    Args:
        module: The network.
        names: For each layer to compare, by its name in the factors, its name in the module.
        factors: The factors.
        source: File or folder that the module's weights come from.
        force: Warn instead.
        allow_globals: Classes that a file of ``torch.save`` may hold.
    """
    recorded, distances = factors.fingerprints(), dict[str, float]()
    compared = [layer for layer in names if layer in recorded]
    for layer in compared:
        weight = module.get_parameter(f"{names[layer]}.weight").detach()
        distance = difference(recorded[layer], tensor_hash(weight), weight.clone)
        if distance is not None:
            distances[layer] = distance
    if not distances:
        return
    edited = _edited_among(distances, source, allow_globals)
    if edited:
        warnings.warn(
            f"{source} is an edited copy: the factors describe its layers {listing(edited, 3)} as they were before.",
            stacklevel=3,
        )
    if unexplained := {layer: distance for layer, distance in distances.items() if layer not in edited}:
        refuse_other_weights(unexplained, len(compared), source, force)


def edited_layers(facts: Any) -> list[str]:
    """Return the layers that a checkpoint's edit and all earlier edits changed.

    Args:
        facts: What the checkpoint says about its edit; the facts of the edit before it are its entry ``"before"``.
    """
    layers: dict[str, None] = {}
    while isinstance(facts, Mapping):
        layers |= dict.fromkeys(facts.get("layers", {}))
        facts = facts.get("before")
    return list(layers)


def _edited_among(layers: Collection[str], source: str | os.PathLike[str], allow_globals: Sequence[str]) -> list[str]:
    """Return the layers that earlier edits of a checkpoint changed."""
    if Path(source).is_dir() and not (Path(source) / NOTE).is_file():
        return []  # an edit leaves a note in a folder, whatever format the weights have
    edited = {plain(layer) for layer in edited_layers(open_checkpoint(source, allow_globals).edit_facts)}
    return [layer for layer in layers if any(_is_same_layer(plain(layer), name) for name in edited)]


def _is_same_layer(name: str, edited: str) -> bool:
    """Tell whether two names can mean one layer: the module that one starts from may lie inside that of the other."""
    return f".{name}".endswith(f".{edited}") or f".{edited}".endswith(f".{name}")
