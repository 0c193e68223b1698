"""Which losses of a step count, given what is backpropagated, and why none does."""

import dataclasses
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curvature._checks import listing
from lightning_curvature.distributed import whole
from lightning_curvature.recording.calls import LayerCall
from lightning_curvature.recording.graph import (
    ancestors,
    node_of,
    origin_of,
    reached,
)
from lightning_curvature.recording.losses import SUPPORTED_LOSSES, OutputLoss, shapes_of
from lightning_curvature.recording.taps import Taps


class NothingToCollectError(RuntimeError):
    """This step gives no curvature; another step may."""


def frozen_layers_message(names: Collection[str]) -> str:
    """Return the message about layers whose outputs need no gradient."""
    return (
        f"Outputs of layers {listing(sorted(names))} need no gradient: everything up to them is frozen (or runs under "
        "no_grad, or reentrant checkpointing). Unfreeze something below them, or leave them out of layers=."
    )


def of_the_output(losses: Sequence[OutputLoss]) -> list[OutputLoss]:
    """Return the losses that say what the model returns: the softmax losses, or, without one, all.

    A squared or binary loss beside a softmax is one more term, of features for example, and is passed over.
    """
    return [loss for loss in losses if loss.kind == "softmax"] or list(losses)


def losses_that_reach(taps: Taps, objective: Tensor | None) -> list[OutputLoss]:
    """Return the losses of a step through which a backward pass goes.

    Args:
        taps: What the step recorded.
        objective: What is backpropagated; None for a step of which that is not known, where all count.
    """
    if objective is None:
        return list(taps.losses)
    met = reached(objective.grad_fn, {loss.node for loss in taps.losses})
    return [loss for loss in taps.losses if loss.node in met]


def without_ignored(loss: OutputLoss, objective: Tensor | None) -> OutputLoss:
    """Return a loss without the positions that the training gives a weight of exactly zero.

    A loss of one number has no such weights, and without an objective they are not known.
    """
    parts = (loss, *loss.twins)
    asked = [part for part in parts if part.output is not None and part.output.dim() > 0]
    if objective is None or objective.numel() != 1 or len(asked) < len(parts):
        return loss
    edges = [part.edge for part in asked if part.edge is not None]
    return loss.without_ignored(torch.autograd.grad(objective, edges, retain_graph=True, allow_unused=True))


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
        seen += " It computes a loss without gradients: take torch.no_grad() or detach() away from it."
    return f"No loss whose curvature is known reaches the training loss.{seen} {SUPPORTED_LOSSES}"


def why_no_gradients(chosen: Collection[str], calls: Sequence[LayerCall], transformed: Collection[str]) -> str | None:
    """Return why a backward pass through a softmax loss gives chosen layers no gradients; None if none of them ran.

    Args:
        chosen: Chosen layers, or those that may be.
        calls: Calls of layers in the step.
        transformed: Layers that ran inside a ``torch.func`` transform.
    """
    ran = {call.name for call in calls} & set(chosen)
    frozen = {call.name for call in calls if call.edge is None} & set(chosen)
    inside = set(transformed) & set(chosen)
    if frozen:
        return frozen_layers_message(frozen)
    if inside and not ran:
        return (
            f"Layers {listing(sorted(inside))} run inside a torch.func transform (vmap, grad, jvp), whose tensors have "
            "no place in the autograd graph. Collect from a step without it: a plain forward pass and "
            "loss.backward(), or over the trained model (lightning_curvature.collect.collect)."
        )
    if ran:
        return f"A softmax loss was backpropagated that does not depend on the chosen layers {listing(sorted(chosen))}."
    return None


def as_one_loss(losses: Sequence[OutputLoss], parameters: Collection[int], named: bool = False) -> list[OutputLoss]:
    """Return the parts of one loss: losses on disjoint positions of one head, each softmax once.

    A head that is called chunk by chunk, or at each step of a sequence, has one loss for each call. Its outputs are
    independent given the inputs, so that their Fisher informations add up. Two losses over one and the same softmax
    (mixed labels) are one.

    Args:
        losses: Softmax losses that one backward pass goes through.
        parameters: Addresses (``id``) of the network's parameters.
        named: Whether the user named the source of their logits, which is then one output.

    Raises:
        RuntimeError: If they are losses of different outputs, or overlap.
    """
    if len(losses) == 1:
        return list(losses)
    origins = [origin_of(node_of(loss.logits), parameters) for loss in losses]
    if not (named or all(origins[0].is_head_of(origin) for origin in origins)):
        raise RuntimeError(several_outputs_message(shapes_of(losses)))
    merged: list[OutputLoss] = []
    for node in dict.fromkeys(origin.node for origin in origins):
        merged += _of_one_call(
            [loss for loss, origin in zip(losses, origins, strict=True) if origin.node is node], node
        )
    return merged


def _of_one_call(losses: Sequence[OutputLoss], node: Node) -> list[OutputLoss]:
    """Merge the losses over the same softmax, among losses over the output ``node`` of one call of a head."""
    if len(losses) == 1:
        return list(losses)
    kept, read = list[OutputLoss](), list[dict[int, Tensor]]()
    for loss in losses:
        entries = _entries_read(loss.logits, node)
        for i, earlier in enumerate(kept):
            both = [(read[i][k], entries[k]) for k in read[i].keys() & entries]
            same = read[i].keys() == entries.keys() and all(torch.equal(*pair) for pair in both)
            if same and _same_softmax(earlier, loss):
                counted = earlier.counted | loss.counted
                kept[i] = dataclasses.replace(earlier, counted=counted, twins=(*earlier.twins, loss))
                break
            if any(bool((mine & theirs).any()) for mine, theirs in both):
                raise RuntimeError(
                    f"{len(losses)} losses read the same outputs in different ways (outputs of shapes "
                    f"{shapes_of(losses)}), so that their classes are not told apart. Name the submodule or method "
                    "that returns the logits that count: logits='...'; a validation step may also return the loss "
                    "that counts."
                )
        else:
            kept.append(loss)
            read.append(entries)
    return kept


def _entries_read(logits: Tensor, node: Node) -> dict[int, Tensor]:
    """Return which entries of a node's outputs the logits depend on: by number of the output, bool of its shape."""
    edges = [GradientEdge(node, i) for i in range(len(getattr(node, "_input_metadata", (0,))))]
    gradients = torch.autograd.grad(logits, edges, torch.ones_like(logits), retain_graph=True, allow_unused=True)
    return {i: whole(gradient) != 0 for i, gradient in enumerate(gradients) if gradient is not None}


def _same_softmax(first: OutputLoss, second: OutputLoss) -> bool:
    """Tell whether two losses that read the same entries read them in the same order."""
    if first.logits.shape != second.logits.shape or first.class_dim != second.class_dim or first.kind != second.kind:
        return False
    z1, z2 = whole(first.logits.detach()), whole(second.logits.detach())
    return torch.allclose(z1, z2.to(z1.dtype), rtol=0, atol=0, equal_nan=True)


def several_outputs_message(shapes: Sequence[Sequence[int]]) -> str:
    """Return the message about losses of different outputs, given the shapes of their logits."""
    return (
        f"{len(shapes)} losses reach the training loss (outputs of shapes {shapes}); the curvature of "
        "one model output is meant. Name the submodule or method that returns the logits of one of them: logits='...'; "
        "a validation step may also return the loss that counts."
    )


def check_log_probabilities(loss: OutputLoss) -> None:
    """Raise ``RuntimeError`` if what ``nll_loss`` received is not normalised."""
    if not loss.log_probabilities:
        return
    rows = whole(loss.logits.detach()).movedim(loss.class_dim, -1)[loss.counted]
    if not bool((rows.float().logsumexp(-1).abs() < 0.05).all()):
        raise RuntimeError(
            "F.nll_loss received values that are not log-probabilities (their exponentials do not sum to 1). "
            "Apply log_softmax first, use F.cross_entropy, or name the logits with logits='...'."
        )


def check_reentrant(losses: Sequence[OutputLoss], taps: Taps, called: Collection[str]) -> None:
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


def output_heads(losses: Sequence[OutputLoss], calls: Sequence[LayerCall]) -> set[str]:
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
