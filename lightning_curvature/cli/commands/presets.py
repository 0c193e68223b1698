"""Layer names for the presets of ``--layers``, in a command that reads layer names from a factor file."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_curvature._checks import listing
from lightning_curvature.cli.commands.output import extra

if TYPE_CHECKING:
    from lightning_curvature.factors.kronecker import KroneckerFactors


def named_layers(layers: list[str] | None, factors: "KroneckerFactors", folder: Path | None) -> list[str] | None:
    """Return ``layers`` with each preset replaced by its layers in the factors; patterns stay as they are.

    Args:
        layers: Presets and patterns; None for all layers.
        factors: The factors; their layers are in the order in which they ran.
        folder: Folder of the model in which presets are looked up; None if there is no folder.

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
            f"--layers {' '.join(presets)}: presets need a model folder (--model) whose config.json describes a "
            "transformers model. Or give patterns of layer names in the factors instead."
        )
    fill(module)
    modules = dict(module.named_modules())
    weight_of = match_layers(factors, (f"{name}.weight" for name in modules))
    head = module.get_output_embeddings()
    heads = {name for name, layer in modules.items() if layer is head}
    chosen = [entry for entry in layers if entry not in PRESETS]
    for preset in presets:
        pools = choose_layers(module, preset).pools[preset]
        pool = next((pool - heads for pool in pools if pool - heads), frozenset[str]())
        if preset == "last-mlp":
            pool = frozenset([name for name in modules if name in pool][-1:])
        in_factors = [layer for layer, name in weight_of.items() if name.removesuffix(".weight") in pool]
        if not in_factors:
            raise ValueError(
                f"--layers {preset}: the factors hold none of the layers of this preset, {listing(sorted(pool), 4)}; "
                f"they hold {listing(factors, 4)}."
            )
        chosen += [layer for layer in in_factors if layer not in chosen]
    return chosen
