"""Copies of a network, or of a part of it, inside the module: running averages, teachers, momentum encoders."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lightning_curvature.distributed import local_part
from lightning_curvature.layers.kinds import is_lazy
from lightning_curvature.layers.ties import find_tie

_TEACHER = re.compile(
    r"(^|_)(ema|teacher|momentum|target|shadow|averaged?|swa|frozen|reference|ref|lpips|perceptual)(_|\d|$)",
    re.IGNORECASE,
)


def find_copies(modules: Mapping[str, nn.Module], candidates: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the counterparts of layers in copies of the modules that hold them.

    Two modules are copies of each other if they have one class and parameters of the same names and shapes. Modules
    with a number in their names, such as repeated blocks and experts, are no copies.

    Args:
        modules: Every module of the network, by name.
        candidates: Names of the layers to look at; others are no counterparts.

    Returns:
        Names of the counterparts of each layer that has some.
    """
    alike: dict[Any, list[str]] = defaultdict(list)
    root_shapes = _shapes(modules[""])
    for name, module in modules.items():
        is_numbered = any(character.isdigit() for character in name)
        if is_numbered or not any(True for _ in module.children()):
            continue
        shapes = _shapes(module)
        alike[type(module), shapes].append(name)
        outside = tuple(entry for entry in root_shapes if not entry[0].startswith(f"{name}."))
        if name and type(module) is type(modules[""]) and shapes == outside:  # the network beside a copy of itself
            alike[name] = ["", name]
    counterparts: dict[str, set[str]] = defaultdict(set)
    for group in alike.values():
        for name in candidates:
            for module_name in group:
                prefix = f"{module_name}." if module_name else ""
                if name.startswith(prefix):
                    rest = name[len(prefix) :]
                    renamed = {f"{copy}.{rest}".lstrip(".") for copy in group if copy != module_name}
                    counterparts[name] |= renamed.intersection(candidates)
    return {name: frozenset(names) for name, names in counterparts.items() if names}


def is_idle_copy(
    name: str,
    layers: Mapping[str, nn.Module],
    counterparts: Collection[str],
    live: Collection[str],
    dead: Collection[str],
) -> bool:
    """Tell whether a layer that got no gradients belongs to a copy that is not trained, or to a teacher.

    Args:
        name: A layer that did not run with a graph.
        layers: Candidates by name.
        counterparts: Its counterparts, see :func:`find_copies`.
        live: Candidates that ran with a graph.
        dead: Candidates that ran without one.
    """
    layer = layers[name]
    frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    trained = [layers[counterpart] for counterpart in counterparts if counterpart in live]
    if trained and (name in dead or frozen or any(_is_equal_copy(layer, counterpart) for counterpart in trained)):
        return True
    return frozen and bool(live) and any(_TEACHER.search(parent) for parent in name.split(".")[:-1])


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    """Return names and shapes of the parameters of a module and its submodules; None for a shape not known yet."""
    return tuple(
        (name, None if nn.parameter.is_lazy(parameter) else tuple(parameter.shape))
        for name, parameter in module.named_parameters()
    )


def _is_equal_copy(layer: Any, counterpart: Any) -> bool:
    """Tell whether two layers have equal weights that are not tied."""
    if is_lazy(layer) or is_lazy(counterpart):
        return False
    if find_tie({"layer": layer.weight, "counterpart": counterpart.weight}) is not None:
        return False
    weight, copy = local_part(layer.weight.detach()), local_part(counterpart.weight.detach())
    return weight.shape == copy.shape and weight.device == copy.device and torch.equal(weight, copy)
