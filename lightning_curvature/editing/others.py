"""Weights outside of the edited layers, which an edit of the update moves towards the reference."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_curvature.distributed import spread_like, whole
from lightning_curvature.editing.reference import Reference
from lightning_curvature.editing.report import EditReport
from lightning_curvature.layers.ties import tied_names


def other_weights(
    reference: Reference | None,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Iterable[str]],
    report: EditReport,
    share: float,
) -> dict[str, Tensor]:
    """Return new values of the weights outside of the edited layers that differ from the reference, by name.

    Embeddings, norms, biases and layers without factors moved in fine-tuning, too. They keep one share of their update;
    adapters of layers without factors stay. Of tied tensors one is returned.

    Args:
        reference: The reference; None for an edit of the weights themselves, which moves nothing else.
        tensors: All tensors of the model, by name.
        layers: For each edited layer, the names of the tensors that are tied to its weight.
        report: The report of the edited layers.
        share: The share that they keep.
    """
    if reference is None or share == 1.0:
        return {}
    matched = reference.matched({layer: f"{layer}.weight" for layer in report.layers})
    edited = {name for names in layers.values() for name in names} | {f"{layer}.weight" for layer in layers}
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in edited and tensor.is_floating_point() and not _is_of_adapter(name)
    }
    others = {}
    for name, names in tied_names(rest, rest).items():
        read = matched.counterpart(name, rest[name].shape) if name == names[0] else None
        if read is not None and (new := moved(whole(rest[name].detach()), read(), share)) is not None:
            others[name] = spread_like(new, rest[name])
    return others


def _is_of_adapter(name: str) -> bool:
    """Tell whether a tensor is a part of an adapter, whose product is the update."""
    return any(part.startswith("lora_") for part in name.split("."))


def moved(tensor: Tensor, start: Tensor, share: float) -> Tensor | None:
    """Return ``start + share (tensor - start)`` in the dtype of ``tensor``; None if the two are equal.

    >>> moved(torch.tensor([3.0]), torch.tensor([1.0]), 0.5)
    tensor([2.])
    """
    if torch.equal(tensor, start.to(tensor)):
        return None
    first = start.to(tensor.device, torch.float64)
    return (first + share * (tensor.double() - first)).to(tensor.dtype)
