"""Copies of a network, or of a part of it, inside the module: running averages, teachers, momentum encoders."""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from lightning_curvature.layers.kinds import is_lazy
from lightning_curvature.layers.ties import find_tie

_TEACHER = re.compile(
    r"(^|_)(ema|teacher|momentum|target|shadow|averaged?|swa|frozen|reference|ref|lpips|perceptual)(_|\d|$)",
    re.IGNORECASE,
)


def find_copies(modules: Mapping[str, nn.Module], candidates: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the counterparts of layers in other modules of the same class, with parameters of the same shapes.

    Repeated blocks and experts, which are numbered, are no copies of each other.

    Args:
        modules: Every module of the network, by name.
        candidates: Names of the layers that matter.
    """
    alike: dict[Any, list[str]] = defaultdict(list)
    whole = _shapes(modules[""])
    for name, module in modules.items():
        numbered = any(character.isdigit() for character in name)
        if numbered or not any(True for _ in module.children()):
            continue
        shapes = _shapes(module)
        alike[type(module), shapes].append(name)
        outside = tuple(entry for entry in whole if not entry[0].startswith(f"{name}."))
        if name and type(module) is type(modules[""]) and shapes == outside:  # the network holds a copy of itself
            alike[name] = ["", name]
    found: dict[str, set[str]] = defaultdict(set)
    for group in alike.values():
        for name in candidates:
            for prefix in group:
                inside = f"{prefix}." if prefix else ""
                if name.startswith(inside):
                    rest = name[len(inside) :]
                    others = (f"{other}.{rest}".lstrip(".") for other in group if other != prefix)
                    found[name] |= {other for other in others if other in candidates}
    return {name: frozenset(others) for name, others in found.items() if others}


def is_idle_copy(
    name: str, layers: Mapping[str, nn.Module], others: Collection[str], live: Collection[str], dead: Collection[str]
) -> bool:
    """Tell whether a layer that got no gradients belongs to a copy that is not trained, or to a teacher.

    Args:
        name: A layer that did not run with a graph.
        layers: Candidates by name.
        others: Its counterparts, see :func:`find_copies`.
        live: Candidates that ran with a graph.
        dead: Candidates that ran without one.
    """
    layer = layers[name]
    frozen = not any(parameter.requires_grad for parameter in layer.parameters())
    trained = [layers[other] for other in others if other in live]
    if trained and (name in dead or frozen or any(_same_values(layer, other) for other in trained)):
        return True
    return frozen and bool(live) and any(_TEACHER.search(part) for part in name.split(".")[:-1])


def _shapes(module: nn.Module) -> tuple[Any, ...]:
    """Return names and shapes of the parameters below a module."""
    return tuple(
        (name, None if nn.parameter.is_lazy(parameter) else tuple(parameter.shape))
        for name, parameter in module.named_parameters()
    )


def _same_values(layer: Any, other: Any) -> bool:
    """Tell whether two layers have equal weights that are not one and the same."""
    if is_lazy(layer) or is_lazy(other) or find_tie({"one": layer.weight, "other": other.weight}) is not None:
        return False
    one, two = (getattr(part.weight.detach(), "_local_tensor", part.weight.detach()) for part in (layer, other))
    return one.shape == two.shape and one.device == two.device and torch.equal(one, two)
