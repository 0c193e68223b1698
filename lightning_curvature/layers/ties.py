"""Tied tensors, which share memory: which ones they are, and what becomes of them when one of them is edited."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_curvature.distributed import local_part


def find_tie(weights: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first two layers with tied weights; None if there are none."""
    layers, places = list(weights), [_Place.of(weight) for weight in weights.values()]
    ties = [
        (earlier, later)
        for group in _groups(places)
        for earlier, later in combinations(group, 2)
        if places[earlier].overlaps(places[later])
    ]
    if not ties:
        return None
    earlier, later = min(ties)
    return layers[earlier], layers[later]


def check_tie(tie: tuple[str, str] | None) -> None:
    """Raise ``ValueError`` if two layers to edit have tied weights; takes what :func:`find_tie` returned."""
    if tie is not None:
        raise ValueError(
            f"Layers {tie[0]!r} and {tie[1]!r} have one weight (tied weights), so that the edit of one would undo "
            "that of the other. Leave one of them out of layers=."
        )


def tied_names(weights: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return, for each layer, the names of the tensors that are tied to its weight.

    Args:
        weights: Weights by layer.
        tensors: Tensors by name; the weights themselves may be among them, and are named then.
    """
    layers, names = list(weights), list(tensors)
    places = [_Place.of(tensor) for tensor in (*weights.values(), *tensors.values())]
    tied: dict[str, list[str]] = {layer: [] for layer in layers}
    for group in _groups(places):
        for index, later in product(group, group):
            if index < len(layers) <= later and places[index].overlaps(places[later]):
                tied[layers[index]].append(names[later - len(layers)])
    return tied


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module; a tensor with several names is under each of them."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def with_replaced(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors by name, with new values for those that are tied to some weights.

    Args:
        tensors: Tensors by name; they and their memory stay as they are.
        weights: Some of these tensors, by layer.
        new: New values of the weights, by layer; layers without them are left alone.
    """
    replaced = dict(tensors)
    copies: dict[int, torch.UntypedStorage] = {}

    def copied(tensor: Tensor) -> Tensor:
        """Return a tensor as a view of a copy of its memory; each memory is copied once."""
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in copies:
            entries = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            entries.set_(memory, 0, (memory.nbytes(),), (1,))
            copies[memory.data_ptr()] = entries.clone().untyped_storage()
        view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return view.set_(copies[memory.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

    for layer, names in tied_names({layer: weights[layer] for layer in new}, tensors).items():
        if all(_is_same_view(tensors[name], weights[layer]) for name in names):
            replaced |= dict.fromkeys(names, new[layer])
        else:  # the weight is a part of another tensor, or its transpose
            copied(weights[layer].detach()).copy_(new[layer])
            replaced |= {name: copied(tensors[name].detach()) for name in names}
    return replaced


class _Place(NamedTuple):
    """The range of memory, in bytes, in which the entries of a tensor lie.

    A tensor without memory of its own overlaps only with itself.
    """

    tensor: Any
    device: str
    start: int
    stop: int

    @classmethod
    def of(cls, tensor: Any) -> "_Place":
        local = local_part(tensor)
        try:
            if local.layout == torch.strided and local.numel() and (start := local.data_ptr()):
                steps = sum((size - 1) * step for size, step in zip(local.shape, local.stride(), strict=True))
                return cls(tensor, str(local.device), start, start + (1 + steps) * local.element_size())
        except (AttributeError, RuntimeError, NotImplementedError):
            pass  # a tensor of a foreign class
        return cls(tensor, "", id(tensor), id(tensor) + 1)

    def overlaps(self, other: "_Place") -> bool:
        """Tell whether two tensors have an entry in common."""
        if self.device != other.device or max(self.start, other.start) >= min(self.stop, other.stop):
            return False
        if self.tensor is other.tensor or _is_same_view(self.tensor, other.tensor):
            return True
        # Interleaved tensors, such as columns of one matrix, have no entry in common although their ranges overlap:
        # mark the bytes of one tensor, and look whether a byte of the other is marked.
        first = min(self.start, other.start)
        marks = torch.zeros(max(self.stop, other.stop) - first, dtype=torch.bool, device="cpu")
        self._bytes(marks, first).fill_(True)
        return bool(other._bytes(marks, first).any())

    def _bytes(self, marks: Tensor, first: int) -> Tensor:
        """Return a view of the marks of this tensor's bytes; ``marks`` starts at the address ``first``."""
        local = local_part(self.tensor)
        width = local.element_size()
        return marks.as_strided(
            (*local.shape, width), (*(step * width for step in local.stride()), 1), self.start - first
        )


def _groups(places: Sequence[_Place]) -> Iterator[list[int]]:
    """Yield groups of indices of places, ascending, such that places of two groups never overlap."""
    group: list[int] = []
    end = ("", 0)  # device and stop of the last byte of the group
    for index in sorted(range(len(places)), key=lambda index: places[index][1:]):
        place = places[index]
        if group and (place.device, place.start) >= end:
            yield sorted(group)
            group = []
        end = max(end, (place.device, place.stop)) if group else (place.device, place.stop)
        group.append(index)
    yield sorted(group)


def _is_same_view(first: Any, second: Any) -> bool:
    """Tell whether two tensors are the same entries of the same memory, in the same order and dtype."""
    first, second = local_part(first), local_part(second)
    return first is second or (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
    )
