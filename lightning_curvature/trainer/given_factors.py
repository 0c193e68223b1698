"""Factors that a callback is given in a file, in the place of collecting any."""

import math
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.distributed import whole
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.fingerprints import difference
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import is_conv1d
from lightning_curvature.layers.modules import find_layer
from lightning_curvature.storage.hashes import tensor_hash


def given_factors(
    file: Path, module: pl.LightningModule, editor: WeightEditor, at_start: bool = True
) -> KroneckerFactors:
    """Return the factors of a file under the names of a module, those of layers that an editor edits.

    Args:
        file: The file.
        module: The module that will be edited. Its names may have other prefixes than those in the file.
        editor: Edits it. If the factors were collected on other weights than those of its reference, or of the module
            where there is none, a warning says so.
        at_start: Whether the module has the weights that the run begins with.

    Raises:
        ValueError: If the file is none of factors, or belongs to another model.
    """
    factors = KroneckerFactors.load(file)
    own = {
        name.replace("base_model.model.", ""): name  # what peft puts between the names
        for name, _ in module.named_parameters(remove_duplicate=False)
    }
    names = {layer: own[name].removesuffix(".weight") for layer, name in match_layers(factors, own).items()}
    given = KroneckerFactors({names[layer]: factors[layer] for layer in factors}, factors.provenance)
    chosen = list(editor.energies(given))
    for name in chosen:
        shape, found = given[name].shape, _shape(module, name)
        if shape != found:
            raise ValueError(
                f"Layer {name!r}: {file} has factors of a {list(shape)} weight, and the module's weight is "
                f"{list(found)}. Were the factors collected on another model?"
            )
    given = KroneckerFactors({name: given[name] for name in chosen}, factors.provenance)
    if at_start or editor.reference is not None:
        _check_weights(file, module, editor, given)
    return given


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    """Return ``(d_out, d_in)`` of a layer of a module."""
    layer = find_layer(module, name)
    d_out, *d_in = layer.weight.shape[::-1] if is_conv1d(layer) else layer.weight.shape
    return int(d_out), math.prod(d_in)


def _check_weights(file: Path, module: pl.LightningModule, editor: WeightEditor, factors: KroneckerFactors) -> None:
    """Warn if factors were collected on other weights than those of the reference, or of the module without one."""
    recorded, others = factors.fingerprints(), list[str]()
    if recorded and editor.reference is not None:  # factors of a training know of no weights
        start = editor.reference.matched({layer: f"{layer}.weight" for layer in recorded})
    for layer, collected_on in recorded.items():
        weight = module.get_parameter(f"{layer}.weight") if editor.reference is None else start.layer(layer)
        weight = whole(weight.detach())
        if difference(collected_on, tensor_hash(weight), weight.clone) is not None:
            others.append(layer)
    if others:
        whose = "this run begins with" if editor.reference is None else f"the reference {editor.reference.name!r} has"
        rank_zero_warn(
            f"The factors in {file} were collected on other weights than {whose}, in {len(others)} of {len(recorded)} "
            f"layers ({listing(others, 3)}). The further the weights are from those, the less they say."
        )
