"""What layers read, example by example."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature._checks import did_you_mean, listing
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.factors.kronecker import KroneckerFactors, LayerFactors
from lightning_curvature.layers.kinds import is_matmul
from lightning_curvature.layers.modules import evaluating
from lightning_curvature.recording.inputs import layer_inputs


def layer_activations(
    module: nn.Module,
    batches: Iterable[Any],
    run: Callable[[Any], Any],
    layers: Sequence[str],
    positions: slice | None = None,
) -> dict[str, Tensor]:
    """Return the inputs of linear layers, from one forward pass over some examples, in eval mode.

    Args:
        module: The network.
        batches: Data; all examples must have as many positions.
        run: Runs the network on a batch.
        layers: Names of the layers.
        positions: Positions to keep, such as ``slice(0, 1)`` for a class token; None for all.

    Returns:
        By layer, ``[examples, positions, d_in]``, float32, on the CPU; a layer that reads ``[n, d_in]`` has one
        position.

    Raises:
        ValueError: If there is no such layer, it is not linear, or there is no example.
        RuntimeError: If a layer does not run exactly once in each forward pass.
    """
    modules = dict(module.named_modules())
    for name in layers:
        if name not in modules:
            raise ValueError(f"There is no layer {name!r}.{did_you_mean(name, modules)}")
        if not is_matmul(modules[name]):
            raise ValueError(f"Layer {name!r} is a {type(modules[name]).__name__}; only linear layers can be analysed.")
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with evaluating(module):
        for batch in batches:
            with layer_inputs({name: modules[name] for name in layers}) as inputs:
                run(batch)
            for name, calls in inputs.items():
                if len(calls) != 1:
                    raise RuntimeError(f"Layer {name!r} ran {len(calls)} times in one forward pass, expected once.")
                rows = calls[0].float().cpu()
                rows = rows[:, None] if rows.dim() == 2 else rows.flatten(1, -2)
                found[name].append(rows if positions is None else rows[:, positions].clone())
    if not all(found.values()):
        raise ValueError(f"There are no examples to read the inputs of {listing(layers)} from.")
    return {name: torch.cat(parts) for name, parts in found.items()}


def chosen_layer(factors: KroneckerFactors, layer: str | None, module: nn.Module) -> tuple[str, LayerFactors]:
    """Return a module's own name of a layer that a factor file names, and its factors.

    Args:
        factors: Factors, whose names may differ from the module's by a prefix.
        layer: Name of the layer among them; None for the last one.
        module: The module.

    Raises:
        ValueError: If there is no such layer among the factors, or in the module.
    """
    chosen = check_layer(factors, layer)
    names = match_layers(factors, module.state_dict())
    return names[chosen].removesuffix(".weight"), factors[chosen]


def check_layer(factors: KroneckerFactors, layer: str | None) -> str:
    """Return the name of a layer among some factors; None for the last one. Errors as :func:`chosen_layer`."""
    if not factors:
        raise ValueError("The factors hold no layer at all. Collect them again.")
    chosen = list(factors)[-1] if layer is None else layer
    if chosen not in factors:
        raise ValueError(f"The factors hold no layer {chosen!r}.{did_you_mean(chosen, factors)}")
    return chosen


def check_activations(inputs: Tensor, d_in: int, what: str) -> Tensor:
    """Return activations ``[n, p, d_in]`` in float64.

    Raises:
        ValueError: If they do not have this shape.
    """
    if inputs.dim() != 3 or inputs.shape[2] != d_in or not inputs.numel():
        raise ValueError(
            f"{what}: expected activations [examples, positions, {d_in}], as layer_activations returns them, found "
            f"{list(inputs.shape)}."
        )
    return inputs.double()
