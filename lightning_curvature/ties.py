"""Weights that share memory: which do, and what becomes of the others when one of them is edited."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def find_tie(weights: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the first two layers whose weights share memory; None if there are none."""
    names, places = list(weights), [_Place.of(weight) for weight in weights.values()]
    for index, place in enumerate(places):
        for earlier in range(index):
            if places[earlier].shares(place):
                return names[earlier], names[index]
    return None


def check_tie(tie: tuple[str, str] | None) -> None:
    """Raise ``ValueError`` if there is a tie between two layers that are both to be edited, see :func:`find_tie`."""
    if tie is not None:
        raise ValueError(
            f"Layers {tie[0]!r} and {tie[1]!r} share one weight (tied weights), so that the edit of one would undo "
            "that of the other. Leave one of them out of layers=."
        )


def names_sharing(weights: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the tensors that share memory with each weight, by layer."""
    places = {name: _Place.of(tensor) for name, tensor in tensors.items()}
    return {
        layer: [name for name, place in places.items() if place.shares(own)]
        for layer, own in ((layer, _Place.of(weight)) for layer, weight in weights.items())
    }


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

    for layer, names in names_sharing({layer: weights[layer] for layer in new}, tensors).items():
        if all(_same(tensors[name], weights[layer]) for name in names):
            replaced |= dict.fromkeys(names, new[layer])
        else:  # a part of another tensor, or turned
            copied(weights[layer].detach()).copy_(new[layer])
            replaced |= {name: copied(tensors[name].detach()) for name in names}
    return replaced


class _Place(NamedTuple):
    """Where the entries of a tensor lie, in bytes; ``stop`` is 0 if that cannot be said."""

    tensor: Any
    start: int = 0
    stop: int = 0

    @classmethod
    def of(cls, tensor: Any) -> "_Place":
        here = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        try:
            if here.layout == torch.strided and here.numel() and (start := here.data_ptr()):
                steps = sum((size - 1) * step for size, step in zip(here.shape, here.stride(), strict=True))
                return cls(tensor, start, start + (1 + steps) * here.element_size())
        except (AttributeError, RuntimeError, NotImplementedError):
            pass  # of a foreign class, which has no memory of its own
        return cls(tensor)

    def shares(self, other: "_Place") -> bool:
        """Tell whether two tensors have an entry in common."""
        if self.tensor is other.tensor:
            return True
        if max(self.start, other.start) >= min(self.stop, other.stop) or self.tensor.device != other.tensor.device:
            return False
        if _same(self.tensor, other.tensor):
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


def _same(one: Any, two: Any) -> bool:
    """Tell whether two tensors are the same entries of the same memory, as those of tied weights are."""
    one, two = (getattr(tensor, "_local_tensor", tensor) for tensor in (one, two))
    return one is two or (
        one.data_ptr() == two.data_ptr()
        and one.shape == two.shape
        and one.stride() == two.stride()
        and one.dtype == two.dtype
    )
