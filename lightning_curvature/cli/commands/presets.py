"""Presets of ``--layers``, for a command that knows layers by the names in a factor file."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_curvature._checks import listing
from lightning_curvature.cli.commands.output import extra

if TYPE_CHECKING:
    from lightning_curvature.factors.kronecker import KroneckerFactors


def named_layers(layers: list[str] | None, factors: "KroneckerFactors", folder: Path | None) -> list[str] | None:
    """Return the layers of factors that presets stand for, and patterns as they are.

    Args:
        layers: Presets and patterns; None for all layers.
        factors: The factors; their layers are in the order in which they ran.
        folder: Folder of the model, which tells the layers of a preset; None if there is none.

    Raises:
        ValueError: If there is a preset and no model, or a preset takes no layer of the factors.
    """
    from lightning_curvature.checkpoints.empty_model import empty_model, fill
    from lightning_curvature.checkpoints.names import match_layers
    from lightning_curvature.layers.selection import PRESETS, choose_layers

    presets = [entry for entry in layers or () if entry in PRESETS]
    if not presets or layers is None:
        return layers
    with extra("text"):
        module = None if folder is None else empty_model(folder)
    if module is None:
        raise ValueError(
            f"--layers {' '.join(presets)}: presets need a model folder, with the config.json of a model of "
            "transformers (--model). Or name patterns on the layers of the factors."
        )
    fill(module)
    modules = dict(module.named_modules())
    names = match_layers(factors, (f"{name}.weight" for name in modules))
    head = module.get_output_embeddings()
    heads = {name for name, layer in modules.items() if layer is head}
    chosen = [entry for entry in layers if entry not in PRESETS]
    for preset in presets:
        pools = choose_layers(module, preset).pools[preset]
        pool = next((pool - heads for pool in pools if pool - heads), frozenset[str]())
        if preset == "last-mlp":
            pool = frozenset([name for name in modules if name in pool][-1:])
        held = [layer for layer, name in names.items() if name.removesuffix(".weight") in pool]
        if not held:
            raise ValueError(
                f"--layers {preset}: the factors hold none of its layers, {listing(sorted(pool), 4)}, but "
                f"{listing(factors, 4)}."
            )
        chosen += [layer for layer in held if layer not in chosen]
    return chosen
