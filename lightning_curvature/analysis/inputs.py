"""What layers read, example by example."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_curvature._checks import did_you_mean, listing
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.layers.kinds import input_rows, is_matmul
from lightning_curvature.layers.modules import evaluating
from lightning_curvature.recording.inputs import layer_inputs

Batch = TypeVar("Batch")

POSITIONS: Mapping[str, slice | None] = {"all": None, "first": slice(0, 1)}
"""Which positions of an example count: all, or the first alone, such as the class token of a ViT."""


def layer_activations(
    module: nn.Module,
    batches: Iterable[Batch],
    run: Callable[[Batch], Any],
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
    chosen = {name: modules[name] for name in layers}
    activations: dict[str, list[Tensor]] = {name: [] for name in layers}
    with evaluating(module):
        for batch in batches:
            for name, inputs in read_inputs(chosen, batch, run, positions).items():
                activations[name].append(inputs.to("cpu", torch.float32, copy=True))
    if not all(activations.values()):
        raise ValueError(f"There are no examples to read the inputs of {listing(layers)} from.")
    return {name: torch.cat(tensors) for name, tensors in activations.items()}


def read_inputs(
    layers: Mapping[str, nn.Module], batch: Batch, run: Callable[[Batch], Any], positions: slice | None = None
) -> dict[str, Tensor]:
    """Return what layers read in one forward pass, without gradients.

    Args:
        layers: The layers, by name.
        batch: The data.
        run: Runs the network on it; the first dimension of what the layers read is the examples.
        positions: Positions to keep; None for all.

    Returns:
        By layer, ``[examples, positions, d_in]``, in the dtype and on the device of the input. The positions of a
        convolution are its patches; a layer that reads ``[n, d_in]`` has one position.

    Raises:
        RuntimeError: If a layer does not run exactly once, or its input was changed in place.
    """
    rows = {}
    with layer_inputs(layers) as calls:
        run(batch)
    for name, inputs in calls.items():
        if len(inputs) != 1:
            raise RuntimeError(f"Layer {name!r} ran {len(inputs)} times in one forward pass, expected once.")
        flat, examples = input_rows(layers[name], inputs[0]), len(inputs[0])
        by_example = flat.reshape(examples, len(flat) // max(examples, 1), flat.shape[1])
        rows[name] = by_example if positions is None else by_example[:, positions]
    return rows


def chosen_layer(factors: KroneckerFactors, layer: str | None, module: nn.Module) -> tuple[str, LayerFactors]:
    """Return the name that a module gives to a layer of a factor file, and the factors of the layer.

    Args:
        factors: Factors, whose names may differ from the module's by a prefix.
        layer: Name of the layer among them; None for the last layer.
        module: The module.

    Raises:
        ValueError: If there is no such layer among the factors, or in the module.
    """
    chosen = check_layer(factors, layer)
    names = match_layers(factors, module.state_dict())
    return names[chosen].removesuffix(".weight"), factors[chosen]


def check_layer(factors: KroneckerFactors, layer: str | None) -> str:
    """Return the name of the layer that a user means.

    Args:
        factors: The factors.
        layer: Name of a layer among them; None for the last layer.

    Raises:
        ValueError: If there is no such layer, or no layer at all.
    """
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
