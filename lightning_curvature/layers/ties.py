"""Weights that share memory: which do, and what becomes of the others when one of them is edited."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def find_tie(weights: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first two layers whose weights share memory; None if there are none."""
    names, places = list(weights), [_Place.of(weight) for weight in weights.values()]
    ties = [
        (index, later)
        for near in _near(places)
        for index, later in combinations(near, 2)
        if places[index].shares(places[later])
    ]
    if not ties:
        return None
    earlier, later = min(ties)
    return names[earlier], names[later]


def check_tie(tie: tuple[str, str] | None) -> None:
    """Raise ``ValueError`` if there is a tie between two layers that are both to be edited, see :func:`find_tie`."""
    if tie is not None:
        raise ValueError(
            f"Layers {tie[0]!r} and {tie[1]!r} share one weight (tied weights), so that the edit of one would undo "
            "that of the other. Leave one of them out of layers=."
        )


def tied_names(weights: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the tensors that share memory with each weight, by layer."""
    layers, names = list(weights), list(tensors)
    places = [_Place.of(tensor) for tensor in (*weights.values(), *tensors.values())]
    found: dict[str, list[str]] = {layer: [] for layer in layers}
    for near in _near(places):
        for index, later in product(near, near):
            if index < len(layers) <= later and places[index].shares(places[later]):
                found[layers[index]].append(names[later - len(layers)])
    return found


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module; those that have several names, under each of them."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def with_replaced(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors by name, of which those that share memory with a weight hold what is new.

    Args:
        tensors: By name; they and their memory stay as they are.
        weights: Some of them, by layer.
        new: What takes their place, by layer.
    """
    replaced = dict(tensors)
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        """Return a tensor as a view of a copy of its memory, one for all of them."""
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in copies:
            entries = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            entries.set_(memory, 0, (memory.nbytes(),), (1,))
            copies[memory.data_ptr()] = entries.clone().untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(copies[memory.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

    for layer, names in tied_names({layer: weights[layer] for layer in new}, tensors).items():
        if all(_same(tensors[name], weights[layer]) for name in names):
            replaced |= dict.fromkeys(names, new[layer])
        else:  # a part of another tensor, or turned
            copied(weights[layer].detach()).copy_(new[layer])
            replaced |= {name: copied(tensors[name].detach()) for name in names}
    return replaced


class _Place(NamedTuple):
    """Where the entries of a tensor lie, in bytes; one that has no memory of its own is a place by itself."""

    tensor: Any
    device: str
    start: int
    stop: int

    @classmethod
    def of(cls, tensor: Any) -> "_Place":
        here = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        try:
            if here.layout == torch.strided and here.numel() and (start := here.data_ptr()):
                steps = sum((size - 1) * step for size, step in zip(here.shape, here.stride(), strict=True))
                return cls(tensor, str(here.device), start, start + (1 + steps) * here.element_size())
        except (AttributeError, RuntimeError, NotImplementedError):
            pass  # of a foreign class
        return cls(tensor, "", id(tensor), id(tensor) + 1)

    def shares(self, other: "_Place") -> bool:
        """Tell whether two tensors have an entry in common."""
        if self.device != other.device or max(self.start, other.start) >= min(self.stop, other.stop):
            return False
        if self.tensor is other.tensor or _same(self.tensor, other.tensor):
            return True
        # Interleaved ones, such as columns of one matrix, have none: mark the bytes of one, and look at the other's.
        first = min(self.start, other.start)
        marks = torch.zeros(max(self.stop, other.stop) - first, dtype=torch.bool, device="cpu")
        self._bytes(marks, first).fill_(True)
        return bool(other._bytes(marks, first).any())

    def _bytes(self, marks: Tensor, first: int) -> Tensor:
        here = getattr(self.tensor, "_local_tensor", self.tensor)
        width = here.element_size()
        return marks.as_strided(
            (*here.shape, width), (*(step * width for step in here.stride()), 1), self.start - first
        )


def _near(places: Sequence[_Place]) -> Iterator[list[int]]:
    """Yield the numbers of places that may overlap, in ascending order; all others are far from each other."""
    near: list[int] = []
    end = ("", 0)
    for index in sorted(range(len(places)), key=lambda index: places[index][1:]):
        place = places[index]
        if near and (place.device, place.start) >= end:
            yield sorted(near)
            near = []
        end = max(end, (place.device, place.stop)) if near else (place.device, place.stop)
        near.append(index)
    yield sorted(near)


def _same(one: Any, two: Any) -> bool:
    """Tell whether two tensors are the same entries of the same memory, as those of tied weights are."""
    one, two = (getattr(tensor, "_local_tensor", tensor) for tensor in (one, two))
    return one is two or (
        one.data_ptr() == two.data_ptr()
        and one.shape == two.shape
        and one.stride() == two.stride()
        and one.dtype == two.dtype
    )
