"""The weights of a module's layers, by name."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature._checks import did_you_mean
from lightning_curvature.layers.kinds import is_editable, refusal


def find_layer(module: nn.Module, name: str) -> Any:
    """Return a layer by its name.

    Raises:
        ValueError: If there is no such layer, or it cannot be edited.
    """
    try:
        layer = module.get_submodule(name)  # unlike named_modules, it knows both names of a module with two
    except AttributeError:
        names = [known for known, candidate in module.named_modules() if is_editable(candidate)]
        raise ValueError(
            f"Layer {name!r}: the module has no such layer.{did_you_mean(name, names)} Were the factors collected on "
            "another model? Layer names are relative to the module that was collected."
        ) from None
    if not is_editable(layer):
        reason = refusal(layer) or f"it is a {type(layer).__name__}"
        raise ValueError(f"Layer {name!r} cannot be edited: {reason}.")
    return layer


def is_under_lora(module: nn.Module, name: str) -> bool:
    """Tell whether a layer is the base of a plain LoRA adapter of peft, which is trained and added to its output."""
    lora: Any = sys.modules.get("peft.tuners.lora.layer")
    above, _, last = name.rpartition(".")
    if lora is None or last != "base_layer":
        return False
    adapter = module.get_submodule(above)
    is_plain = isinstance(adapter, lora.Linear) and not getattr(adapter, "lora_variant", None)
    return is_plain and any(part.requires_grad for part in adapter.parameters())


def layer_weights(module: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return the weights of layers as they are stored: the shards, if FSDP2 shards the module.

    Raises:
        ValueError: If a weight is no parameter of its layer.
    """
    for submodule in module.modules():
        if callable(reshard := getattr(submodule, "reshard", None)):
            reshard()  # between a forward and a backward pass FSDP2 puts gathered copies in the place of the shards
    layers = {name: module.get_submodule(name) for name in names}
    for name, layer in layers.items():
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            raise ValueError(f"Layer {name!r} cannot be edited: {refusal(layer) or 'it has no weight of its own'}.")
    return {name: layer.weight for name, layer in layers.items()}


@torch.no_grad()
def write_weights(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into weights in place; both are by layer."""
    for name, weight in weights.items():
        weight.copy_(values[name])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode without gradients, and every submodule back in its own mode afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, training in modes:
            submodule.training = training
