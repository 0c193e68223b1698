"""Logits that the user names, since the model hides its softmax: their source, and the dimension of their classes."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_curvature._checks import did_you_mean, listing
from lightning_curvature.recording.graph import (
    SoftmaxUse,
    between,
    hides_its_operations,
    node_of,
    path_below,
    reached,
    reaches,
    softmax_uses,
)
from lightning_curvature.recording.losses import (
    SUPPORTED_LOSSES,
    OtherLoss,
    OutputLoss,
    every_position,
)


def named_target(root: nn.Module, name: str) -> Any:
    """Return the submodule or method that ``logits=`` names.

    Raises:
        ValueError: If there is none.
    """
    target: Any = root
    for part in name.split("."):
        target = getattr(target, part, None)
    if not isinstance(target, nn.Module) and not callable(target):
        options = [*(n for n, _ in root.named_modules() if n), *_own_methods(root)]
        raise ValueError(
            f"logits={name!r} is neither a submodule nor a method of {type(root).__name__}."
            f"{did_you_mean(name, options)}"
        )
    return target


def _own_methods(root: nn.Module) -> list[str]:
    return [name for name, value in vars(type(root)).items() if callable(value) and not name.startswith("_")]


@contextmanager
def logits_seen(root: nn.Module, name: str, see: Callable[[Any], None]) -> Iterator[None]:
    """Watch what a submodule or method returns, for the time of a ``with`` block.

    Args:
        root: The network.
        name: Name of a submodule or method, see :func:`named_target`.
        see: Called with each value that it returns.
    """
    target = named_target(root, name)
    if isinstance(target, nn.Module):
        handle = target.register_forward_hook(lambda _module, _args, output: see(output))
        try:
            yield
        finally:
            handle.remove()
        return
    parent_name, _, attribute = name.rpartition(".")
    attributes = vars(root.get_submodule(parent_name))
    before = attributes.get(attribute)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        output = target(*args, **kwargs)
        see(output)
        return output

    attributes[attribute] = wrapper
    try:
        yield
    finally:
        if before is None:
            del attributes[attribute]
        else:
            attributes[attribute] = before


def losses_above(named: Sequence[OutputLoss], seen: Sequence[OutputLoss], objective: Tensor | None) -> list[OutputLoss]:
    """Return the losses that a backward pass goes through, and that are computed from named logits.

    Args:
        named: What the submodule or method that the user named returned.
        seen: The losses of the step.
        objective: What is backpropagated, or None.
    """
    losses = list(seen)
    if objective is not None:
        met = reached(objective.grad_fn, {loss.node for loss in losses})
        losses = [loss for loss in losses if loss.node in met]
    goals = {loss.node for loss in named}
    return [loss for loss in losses if reached(node_of(loss.logits), goals)]


def hide_a_softmax(named: Sequence[OutputLoss], objective: Tensor | None) -> bool:
    """Tell whether named logits go into a softmax that is computed by hand, or where that cannot be seen."""
    paths = [[] if objective is None else between(objective.grad_fn, loss.node) for loss in named]
    return any(softmax_uses(path) or hides_its_operations(path) for path in paths)


def with_classes(loss: OutputLoss, class_dim: int) -> OutputLoss:
    """Return named logits with their class dimension set, and every position counted."""
    return dataclasses.replace(loss, class_dim=class_dim, counted=every_position(loss.logits.detach(), class_dim))


def find_class_dim(
    loss: OutputLoss, name: str, class_dim: int | None, other_losses: Sequence[OtherLoss], objective: Tensor | None
) -> int:
    """Return the class dimension of named logits whose softmax is computed by hand, not by a known loss.

    Args:
        loss: The named logits.
        name: What they were named by.
        class_dim: What the user said, or None.
        other_losses: Losses of the step that are no softmax losses.
        objective: What is backpropagated, or None.

    Raises:
        RuntimeError: If no softmax is applied to them as they are, it cannot be told which dimension holds the classes,
            or there is one class only.
    """
    shape = tuple(loss.logits.shape)
    goal = loss.node
    path = [] if objective is None else between(objective.grad_fn, goal)
    uses = softmax_uses(path)
    if not uses and not hides_its_operations(path):
        _check_no_other_loss(name, goal, other_losses, bool(path))
    below = [origin for use in uses for origin in [path_below(use.node, goal)]]
    changed = sorted({operation for operations, _ in below for operation in operations})
    if changed:
        raise RuntimeError(
            f"logits={name!r}: between what it returned and the softmax of the loss there is more than views "
            f"({', '.join(changed)}), so it returns no logits. Name the submodule or method that returns what goes "
            "into the softmax."
        )
    dim = _told_dim(shape, uses, any(reordered for _, reordered in below), name, class_dim)
    if shape[dim] < 2:
        raise RuntimeError(
            f"logits={name!r} returned {list(shape)}: one class only, whose softmax is always 1. Of binary and squared "
            f"losses, these are known. {SUPPORTED_LOSSES}"
        )
    return dim


def _told_dim(
    shape: tuple[int, ...], uses: Sequence[SoftmaxUse], reordered: bool, name: str, class_dim: int | None
) -> int:
    """Return the dimension of the classes, by what the user said and the softmaxes that were seen."""
    fits = set(range(len(shape)))
    for use in uses:
        fits &= {dim for dim, size in enumerate(shape) if size == use.classes}
        if not reordered and use.shape == shape:
            fits &= {use.dim}
    last = len(shape) - 1
    if class_dim is not None:
        dim = class_dim + len(shape) if class_dim < 0 else class_dim
        if not 0 <= dim < len(shape):
            raise RuntimeError(
                f"class_dim={class_dim}: logits={name!r} returned {list(shape)}, without that dimension."
            )
        if dim not in fits:
            classes = sorted({use.classes for use in uses})
            raise RuntimeError(
                f"class_dim={class_dim}: logits={name!r} returned {list(shape)}, and the softmax of the loss has "
                f"{classes} classes, in another dimension."
            )
        return dim
    if len(fits) == 1:
        return fits.pop()
    if uses and not reordered and last in fits and all(use.dim == len(use.shape) - 1 for use in uses):
        return last
    if not uses and len(shape) <= 2:
        return last
    raise RuntimeError(
        f"logits={name!r} returned {list(shape)}, and which dimension holds the classes cannot be told from the loss. "
        "Say it: class_dim=1 for [batch, classes, ...], class_dim=-1 for [batch, ..., classes]."
    )


def _check_no_other_loss(name: str, goal: Node, others: Sequence[OtherLoss], known: bool) -> None:
    """Raise if logits go into a loss that is no softmax loss, as far as that can be told."""
    direct = sorted({loss.name for loss in others if reaches(loss.input.grad_fn, {goal})})
    if direct:
        raise RuntimeError(
            f"logits={name!r} goes into {listing(direct)}, and into no softmax: it is no softmax loss, so its "
            f"curvature is another one than would be collected. {SUPPORTED_LOSSES}"
        )
    if known:
        raise RuntimeError(
            f"logits={name!r} goes into no softmax on its way to the training loss (a binary, squared or margin "
            f"loss?), so its curvature is another one than would be collected. {SUPPORTED_LOSSES}"
        )
