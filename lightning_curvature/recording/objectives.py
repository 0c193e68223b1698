"""Which softmax losses of a step count, given what is backpropagated, and where the classes of named logits lie."""

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curvature._checks import listing
from lightning_curvature.distributed import whole
from lightning_curvature.recording.graph import (
    SoftmaxUse,
    ancestors,
    between,
    hides_its_operations,
    node_of,
    origin_of,
    path_below,
    reached,
    reaches,
    softmax_uses,
)
from lightning_curvature.recording.losses import OtherLoss, SoftmaxLoss, shapes_of
from lightning_curvature.recording.taps import LayerCall, Taps

_KNOWN = (
    "The curvature is defined here for F.cross_entropy, nn.CrossEntropyLoss, and F.nll_loss after log_softmax; a model "
    "that hides it (a fused or compiled loss, a hand-written focal or margin loss over a softmax) names the submodule "
    "or method that returns its logits: logits='...', and class_dim= if the classes are not the last of three or more "
    "dimensions."
)


class NothingToCollectError(RuntimeError):
    """A step holds nothing that curvature could be collected from; another step may."""


def frozen_layers(names: Collection[str]) -> str:
    """Return what to do about layers whose outputs need no gradient."""
    return (
        f"Outputs of layers {listing(sorted(names))} need no gradient: everything up to them is frozen (or runs under "
        "no_grad, or reentrant checkpointing). Unfreeze something below them, or leave them out of layers=."
    )


def losses_that_reach(taps: Taps, objective: Tensor | None) -> list[SoftmaxLoss]:
    """Return the softmax losses of a step through which a backward pass goes.

    Args:
        taps: What the step recorded.
        objective: What is backpropagated; None for a step of which that is not known, where all count.
    """
    if objective is None:
        return list(taps.losses)
    met = reached(objective.grad_fn, {loss.node for loss in taps.losses})
    return [loss for loss in taps.losses if loss.node in met]


def seen_below(taps: Taps, named: Sequence[SoftmaxLoss], objective: Tensor | None) -> list[SoftmaxLoss]:
    """Return the known softmax losses that a backward pass goes through, and that named logits go into.

    Args:
        taps: What the step recorded.
        named: What the submodule or method that the user named returned.
        objective: What is backpropagated, or None.
    """
    losses = list(taps.seen)
    if objective is not None:
        met = reached(objective.grad_fn, {loss.node for loss in losses})
        losses = [loss for loss in losses if loss.node in met]
    goals = {loss.node for loss in named}
    return [loss for loss in losses if reached(node_of(loss.logits), goals)]


def without_ignored(loss: SoftmaxLoss, objective: Tensor | None) -> SoftmaxLoss:
    """Return a loss without the positions that the training gives a weight of exactly zero.

    Where the loss is one number, or nothing is backpropagated, there is nothing to ask.
    """
    parts = (loss, *loss.twins)
    asked = [part for part in parts if part.output is not None and part.output.dim() > 0]
    if objective is None or objective.numel() != 1 or len(asked) < len(parts):
        return loss
    edges = [part.edge for part in asked if part.edge is not None]
    factors = torch.autograd.grad(objective, edges, retain_graph=True, allow_unused=True)
    used = [
        factor.reshape(loss.counted.shape) != 0
        for factor in factors
        if factor is not None and factor.numel() == loss.counted.numel()
    ]
    if len(used) < len(parts):
        return loss
    return dataclasses.replace(loss, counted=loss.counted & torch.stack(used).any(0))


def why_no_loss(taps: Taps, logits: str | None) -> str:
    """Return why a backward pass has no softmax loss, and what to do."""
    if logits is not None:
        return (
            f"logits={logits!r}: nothing that it returned reaches the training loss (with gradients). Name the "
            "submodule or method whose return value the loss is computed from."
        )
    names = sorted({loss.name for loss in taps.other_losses})
    seen = f" It computes {listing(names)}." if names else ""
    if taps.without_gradients:
        seen += " It computes a cross-entropy without gradients: take torch.no_grad() or detach() away from it."
    return f"No softmax cross-entropy reaches the training loss.{seen} {_KNOWN}"


def as_one_loss(losses: Sequence[SoftmaxLoss], parameters: Collection[int], named: bool = False) -> list[SoftmaxLoss]:
    """Return losses that are one loss, on disjoint positions of one head; each distribution is there once.

    A head that is called chunk by chunk, or at each step of a sequence, has one loss for each call. Its outputs are
    independent given the inputs, so that their Fisher informations add up. Two losses over one and the same softmax
    (mixed labels) are one.

    Args:
        losses: Softmax losses that one backward pass goes through.
        parameters: Addresses (``id``) of the network's parameters.
        named: Whether the user named what their logits come from: one output, whatever made it.

    Raises:
        RuntimeError: If they are losses of different outputs, or overlap.
    """
    if len(losses) == 1:
        return list(losses)
    origins = [origin_of(node_of(loss.logits), parameters) for loss in losses]
    if not (named or all(origins[0].is_head_of(origin) for origin in origins)):
        raise RuntimeError(several_outputs(shapes_of(losses)))
    merged: list[SoftmaxLoss] = []
    for node in dict.fromkeys(origin.node for origin in origins):
        merged += _of_one_call(
            [loss for loss, origin in zip(losses, origins, strict=True) if origin.node is node], node
        )
    return merged


def _of_one_call(losses: Sequence[SoftmaxLoss], node: Node) -> list[SoftmaxLoss]:
    """Return the losses over the output of one call of a head, ``node``, those over the same softmax as one."""
    if len(losses) == 1:
        return list(losses)
    kept, read = list[SoftmaxLoss](), list[dict[int, Tensor]]()
    for loss in losses:
        entries = _entries_read(loss.logits, node)
        for i, other in enumerate(kept):
            both = [(read[i][k], entries[k]) for k in read[i].keys() & entries]
            same = read[i].keys() == entries.keys() and all(torch.equal(*pair) for pair in both)
            if same and _same_softmax(other, loss):
                counted = other.counted | loss.counted
                kept[i] = dataclasses.replace(other, counted=counted, twins=(*other.twins, loss))
                break
            if any(bool((mine & theirs).any()) for mine, theirs in both):
                raise RuntimeError(
                    f"{len(losses)} softmax losses read the same outputs in different ways (logits of shapes "
                    f"{shapes_of(losses)}), so that their classes are not told apart. Name the submodule or method "
                    "that returns the logits that count: logits='...'; a validation step may also return the loss "
                    "that counts."
                )
        else:
            kept.append(loss)
            read.append(entries)
    return kept


def _entries_read(logits: Tensor, node: Node) -> dict[int, Tensor]:
    """Return which entries of the outputs of a node logits are made of: bool, of each output's shape, by its number."""
    edges = [GradientEdge(node, i) for i in range(len(getattr(node, "_input_metadata", (0,))))]
    found = torch.autograd.grad(logits, edges, torch.ones_like(logits), retain_graph=True, allow_unused=True)
    return {i: whole(gradient) != 0 for i, gradient in enumerate(found) if gradient is not None}


def _same_softmax(one: SoftmaxLoss, two: SoftmaxLoss) -> bool:
    """Tell whether two losses that read the same entries read them in the same order."""
    if one.logits.shape != two.logits.shape or one.class_dim != two.class_dim:
        return False
    z1, z2 = whole(one.logits.detach()), whole(two.logits.detach())
    return torch.allclose(z1, z2.to(z1.dtype), rtol=0, atol=0, equal_nan=True)


def several_outputs(shapes: Sequence[Sequence[int]]) -> str:
    """Return what to do about losses of different outputs, given the shapes of their logits."""
    return (
        f"{len(shapes)} softmax losses reach the training loss (logits of shapes {shapes}); the curvature of "
        "one model output is meant. Name the submodule or method that returns the logits of one of them: logits='...'; "
        "a validation step may also return the loss that counts."
    )


def check_log_probabilities(loss: SoftmaxLoss) -> None:
    """Raise ``RuntimeError`` if what ``nll_loss`` received is not normalised."""
    if not loss.log_probabilities:
        return
    rows = whole(loss.logits.detach()).movedim(loss.class_dim, -1)[loss.counted]
    if not bool((rows.float().logsumexp(-1).abs() < 0.05).all()):
        raise RuntimeError(
            "F.nll_loss received values that are not log-probabilities (their exponentials do not sum to 1). "
            "Apply log_softmax first, use F.cross_entropy, or name the logits with logits='...'."
        )


# Logits that the user named ------------------------------------------------------------------------------------------


def find_class_dim(loss: SoftmaxLoss, name: str, class_dim: int | None, taps: Taps, objective: Tensor | None) -> int:
    """Return the dimension of the classes of logits that the user named, and whose softmax is written out by hand.

    Args:
        loss: The named logits.
        name: What they were named by.
        class_dim: What the user said, or None.
        taps: What the step recorded.
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
        _check_no_other_loss(name, goal, taps.other_losses, bool(path))
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
            f"logits={name!r} returned {list(shape)}: one class only, whose softmax is always 1. A binary or squared "
            "loss has no softmax; its curvature is not collected."
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
    direct = sorted({other.name for other in others if reaches(other.input.grad_fn, {goal})})
    if direct:
        raise RuntimeError(
            f"logits={name!r} goes into {listing(direct)}, and into no softmax: it is no softmax loss, so its "
            f"curvature is another one than would be collected. {_KNOWN}"
        )
    if known:
        raise RuntimeError(
            f"logits={name!r} goes into no softmax on its way to the training loss (a binary, squared or margin "
            f"loss?), so its curvature is another one than would be collected. {_KNOWN}"
        )


# What empirical needs ------------------------------------------------------------------------------------------------


def empirical_unit(losses: Sequence[SoftmaxLoss]) -> Tensor:
    """Return the factor, float64, that makes gradients of the training's backward those of the plain summed loss.

    The factor that arrived at the loss (gradient accumulation, loss scaling, a user's own weight) and the reduction's
    denominator are divided out.

    Raises:
        RuntimeError: If the loss reached the backward pass with a weight of its own for each position, or chunks of it
            with different ones.
    """
    units = [_unit(loss) for loss in losses]
    if len(units) > 1:
        first = units[0]
        if not all(torch.allclose(unit, first.to(unit.device), rtol=1e-4, atol=0) for unit in units):
            raise RuntimeError(_WEIGHED)
    return units[0]


_WEIGHED = (
    "fisher='empirical': the training weighs its loss positions differently, so gradients of the plain loss cannot be "
    "told from them. Use fisher='sketched', which does not depend on the training loss."
)


def _unit(loss: SoftmaxLoss) -> Tensor:
    parts: list[tuple[Tensor, Tensor]] = []
    for part in (loss, *loss.twins):
        factor, denominator = part.factor, part.denominator
        if factor is None or denominator is None:
            raise RuntimeError(
                "The training's backward never reached the loss; fisher='empirical' has nothing to read."
            )
        if not (part is loss or torch.equal(part.counted, loss.counted)):
            raise RuntimeError(_WEIGHED)
        parts.append((_uniform(whole(factor)), whole(denominator).double()))
    if len(parts) == 1:
        factor, denominator = parts[0]
        return denominator / factor
    rates = [factor / denominator for factor, denominator in parts]
    return 1.0 / sum(rates[1:], rates[0])


def _uniform(arrived: Tensor) -> Tensor:
    """Return the one factor, float64, that arrived at all positions of a loss."""
    if arrived.numel() == 1:  # nothing to compare, so that an accelerator is not waited for
        return torch.where(arrived == 0, 1, arrived).double().reshape(())
    factors = arrived[arrived != 0]  # with reduction="none" a weight of zero leaves a position out
    factor = factors[0] if factors.numel() else arrived.new_ones(())
    if bool((factors != factor).any()):
        raise RuntimeError(_WEIGHED)
    return factor.double()


def check_single_path(losses: Sequence[SoftmaxLoss], goals: set[Node], objective: Tensor | None) -> None:
    """Raise if the training loss reaches the layers on another path than through the softmax loss."""
    if any(loss.output is None for loss in losses) or objective is None:
        raise RuntimeError("fisher='empirical' reads the training's own loss; it cannot be used with logits='...'.")
    barriers = {part.node for loss in losses for part in (loss, *loss.twins)}
    stack, seen = [objective.grad_fn], set(barriers)
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in goals:
            raise RuntimeError(
                "fisher='empirical': the training loss reaches the layers on other paths than through the "
                "cross-entropy (a regularizer, an auxiliary loss), so their gradients are mixed. Use fisher='sketched' "
                "or 'sampled'."
            )
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)


def check_unreached(goals: set[Node], objective: Tensor) -> None:
    """Raise if another backward pass of the same step would reach the layers too."""
    if reaches(objective.grad_fn, goals):
        raise RuntimeError(
            "fisher='empirical': a second backward pass through the same forward pass reaches the layers, and its "
            "gradients would mix with the first's. Use fisher='sketched' or 'sampled'."
        )


def check_reentrant(losses: Sequence[SoftmaxLoss], taps: Taps, called: Collection[str]) -> None:
    """Raise if the logits were computed under reentrant activation checkpointing, in which layers have no graph.

    Args:
        losses: The losses.
        taps: What the step recorded.
        called: Layers that ran with a graph.
    """
    hidden = sorted(taps.without_graph - set(called))
    if hidden and any(
        node.name() == "CheckpointFunctionBackward" for loss in losses for node in ancestors(node_of(loss.logits))
    ):
        raise RuntimeError(
            f"The model uses reentrant activation checkpointing: layers {listing(hidden)} run without a graph, so "
            "their gradients cannot be taken. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint "
            "(transformers: gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))."
        )


def output_heads(losses: Sequence[SoftmaxLoss], calls: Sequence[LayerCall]) -> set[str]:
    """Return the names of layers whose output is the logits, up to views, casts and elementwise operations."""
    nodes = {call.edge.node: call.name for call in calls if call.edge is not None}
    heads = set()
    for loss in losses:
        node: Node | None = node_of(loss.logits)
        while node is not None and node not in nodes:
            parents = [parent for parent, _ in node.next_functions if parent is not None]
            parents = [parent for parent in parents if parent.name() != "torch::autograd::AccumulateGrad"]
            node = parents[0] if len(parents) == 1 else None
        if node in nodes:
            heads.add(nodes[node])
    return heads
