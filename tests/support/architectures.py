"""Layers of an architecture, written by hand, and a check of what the presets take of it."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lightning_curvature.layers.kinds import is_matmul
from lightning_curvature.layers.selection import choose_layers


def image(size=32):
    return torch.randn(2, 3, size, size)


@dataclass
class Case:
    """Layers are relative to ``inside``; ``#`` stands for 0 and 1, ``a|b`` for a and b."""

    make: Any
    inputs: Any
    head: str
    inside: str = ""
    mlp: str = ""
    attention: str = ""
    last: str = ""
    rest: str = ""
    uncalled: str = ""

    def names(self, field):
        """Write a field out."""
        names = set()
        for pattern in getattr(self, field).split():
            options = [pattern[1:] if pattern.startswith("/") else self.inside + pattern]
            while any(set("|#") & set(name) for name in options):
                options = [part for name in options for part in _expand(name)]
            names |= set(options)
        return names


def _expand(name):
    if "#" in name:
        return [name.replace("#", str(i), 1) for i in (0, 1)]
    group = re.search(r"\(([^()]*)\)", name)
    if group is None:
        return [name]
    return [name[: group.start()] + option + name[group.end() :] for option in group[1].split("|")]


def order_of(net, inputs):
    """Run a network and return its linear layers and convolutions in the order in which they run."""
    order, names = [], {module: name for name, module in net.named_modules()}
    kinds = [module for module in names if is_matmul(module) or isinstance(module, nn.Conv2d)]
    handles = [module.register_forward_hook(lambda m, *_: order.append(names[m])) for module in kinds]
    net.eval()
    net(**inputs) if isinstance(inputs, dict) else net(inputs)
    for handle in handles:
        handle.remove()
    return order


def resolve(net, preset, order, head):
    choice = choose_layers(net, preset)
    return choice.resolve([name for name in order if name in choice.modules], {head})


def check(case, net, order):
    head = next(name for name in (*case.head.split("|"), "") if name in dict(net.named_modules()))
    mlp, attention, rest, uncalled = (case.names(field) for field in ("mlp", "attention", "rest", "uncalled"))
    if mlp:
        assert set(resolve(net, "mlp", order, head)) == mlp
    if attention:
        assert set(resolve(net, "attention", order, head)) == attention
    elif not uncalled:
        with pytest.raises(ValueError, match="Preset 'attention'"):
            choose_layers(net, "attention")
    if case.last != "ANY":
        assert resolve(net, "last-mlp", order, head) == sorted(case.names("last"))
    tied = {"lm_head"} if architecture_ties(net) else set()
    linear = {name for name in mlp | attention | rest | {head} - {""} if is_matmul(net.get_submodule(name))} - tied
    linear |= {name for name, part in net.named_modules() if isinstance(part, nn.Conv2d) and part.groups == 1}
    assert set(choose_layers(net, "linear").modules) == linear | uncalled
    if linear - {head}:
        assert set(resolve(net, "linear", order, head)) == linear - {head}


def architecture_ties(net):
    return hasattr(net, "lm_head") and net.lm_head.weight is net.get_input_embeddings().weight


def check_as_it_runs(case):
    """Check a network of random weights in the order in which its layers run."""
    torch.manual_seed(0)
    net = case.make()
    # One that does not run at a tiny size runs in the order in which it is written.
    check(case, net, order_of(net, case.inputs()) if case.inputs else list(choose_layers(net, "linear").modules))
