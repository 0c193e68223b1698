"""Layers that read one tensor: their factor A is summed and kept once, on one process or on several."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch

from lightning_curvature.collect.moments import SecondMoment
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.distributed import Ranks

STATE_VERSION = 5
"""Of what :func:`state_of` returns; sums of another version are not read."""


def tied_inputs(sums: Mapping[str, LayerSums]) -> dict[str, str]:
    """Return, for each layer, the first one that has the same inputs' moment; itself if there is none."""
    first: dict[int, str] = {}  # the sums keep the moments, so that no id is used again
    return {name: first.setdefault(id(layer.inputs), name) for name, layer in sums.items()}


def tie_again(sums: Mapping[str, LayerSums], first: Mapping[str, str]) -> None:
    """Tie the inputs' moments of separate sums.

    Args:
        sums: Sums by layer.
        first: For each layer, the first one with the same inputs, as :func:`tied_inputs` tells.
    """
    for name, first_name in first.items():
        sums[name].tie_inputs(sums[first_name].inputs)


def state_of(sums: Mapping[str, LayerSums]) -> dict[str, Any]:
    """Return everything that :func:`sums_from` needs, as tensors and primitives; a tied moment is there once."""
    first, states = tied_inputs(sums), {name: layer.state_dict() for name, layer in sums.items()}
    for name, first_name in first.items():
        if name != first_name:
            del states[name]["moments"]["inputs"]
    return {"version": STATE_VERSION, "sums": states, "shared": first}


def sums_from(
    state: Mapping[str, Any], new: Callable[[str, LayerKind, torch.device], LayerSums]
) -> dict[str, LayerSums]:
    """Return the sums that :func:`state_of` was given.

    Args:
        state: What it returned.
        new: Returns empty sums of a layer, given its name, its kind, and the device on which they live.
    """
    sums, nowhere = dict[str, LayerSums](), torch.device("meta")
    for name, layer in state["sums"].items():
        sums[name] = new(name, LayerKind(0, 0, layer["transposed"]), nowhere)
        sums[name].load_state_dict(layer)
    tie_again(sums, state["shared"])
    return sums


def tied_by_all(ranks: Ranks, first: Mapping[str, str]) -> dict[str, Hashable]:
    """Return a key for each layer, equal for layers whose inputs are tied on all processes. A collective.

    Args:
        ranks: The processes.
        first: For each layer that this process has seen, the first one with the same inputs, as :func:`tied_inputs`
            tells.
    """
    by_rank = ranks.gather(dict(first))
    names = dict.fromkeys(name for ties in by_rank for name in ties)
    return {name: tuple(ties.get(name) for ties in by_rank) for name in names}


def sums_over(
    ranks: Ranks,
    kinds: Mapping[str, LayerKind],
    get: Callable[[str], LayerSums],
    to: Callable[[str], int | None] = lambda _: None,
    groups: Mapping[str, Hashable] | None = None,
    new: Callable[[str, LayerKind, torch.device], LayerSums] = lambda _, kind, device: LayerSums.zero(kind, device),
) -> Iterator[tuple[str, LayerSums]]:
    """Yield the sums of all processes by layer, one layer at a time. A collective.

    Args:
        ranks: The processes; not all of them need to have seen every layer, or any.
        kinds: Layers that this process has seen.
        get: Returns the sums of one of these.
        to: Returns the only process that needs the totals of a layer, or None.
        groups: What :func:`tied_by_all` returned; layers of one group, which go to one process, have one inputs'
            moment in the result, too. By default each layer has its own.
        new: Returns empty sums of a layer that this process has not seen.

    Raises:
        RuntimeError: If two processes have seen a layer of one name and of different kinds.
    """
    union: dict[str, LayerKind] = {}
    for told in ranks.gather(dict(kinds)):
        for name, kind in told.items():
            if union.setdefault(name, kind) != kind:
                raise RuntimeError(f"Layer {name!r} is {union[name]} on one process and {kind} on another.")
    groups = groups or {name: name for name in union}
    left = Counter(groups[name] for name in union)
    inputs: dict[Hashable, SecondMoment] = {}
    for name, kind in union.items():
        sums = get(name) if name in kinds else new(name, kind, ranks.device)
        summed = sums.over(ranks, to(name), inputs.pop(groups[name], None))
        left[groups[name]] -= 1
        if left[groups[name]]:
            inputs[groups[name]] = summed.inputs  # only as long as another layer needs it
        yield name, summed
