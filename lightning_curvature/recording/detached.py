"""Detached copies of activations: a step that cuts its graph in two, and hands the gradient on by itself.

A head that is backpropagated chunk by chunk reads a detached copy of the trunk's output, and the training then calls
``activation.backward(gradient)``. What the Fisher's backward passes send to the copy is handed on in the same way.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_curvature.distributed import whole
from lightning_curvature.recording.calls import LayerCall
from lightning_curvature.recording.fisher import backpropagate
from lightning_curvature.recording.graph import leaves_below
from lightning_curvature.recording.losses import OutputLoss


@dataclass(eq=False)
class DetachedCopy:
    """A detached copy of an activation below the logits.

    Args:
        leaf: The copy; its memory is that of the activation.
        gradients: What each backward pass for the Fisher sent to it.
        losses: The losses above it.
    """

    leaf: Tensor
    gradients: list[Tensor]
    losses: list[OutputLoss]

    def is_part_of(self, activation: Tensor) -> bool:
        """Tell whether the copy is a view of the memory of an activation."""
        leaf = self.leaf
        same_memory = leaf.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr()
        if not same_memory or leaf.dtype != activation.dtype:
            return False
        (start, end), (first, last) = _extent(leaf), _extent(activation)
        return leaf.numel() > 0 and first <= start and end <= last


def detached_leaves(losses: Sequence[OutputLoss], parameters: Collection[int]) -> list[Tensor]:
    """Return the leaves below the logits of some losses that are no parameters.

    Args:
        losses: The losses.
        parameters: Addresses (``id``) of the network's parameters.
    """
    leaves = {id(leaf): leaf for loss in losses for leaf in leaves_below(loss.logits)}
    return [
        leaf
        for address, leaf in leaves.items()
        if address not in parameters and not isinstance(leaf, torch.nn.Parameter)
    ]


def as_call(leaf: Tensor) -> LayerCall:
    """Return a leaf as something that gradients can be sent to."""
    return LayerCall(
        name="",
        module=torch.nn.Identity(),
        inputs=leaf.detach(),
        version=0,
        edge=get_gradient_edge(leaf),
        output_shape=leaf.shape,
        output_dtype=leaf.dtype,
    )


def gradients_at(activation: Tensor, copies: Sequence[DetachedCopy], together: bool) -> list[Tensor]:
    """Return what copies of parts of an activation received, as gradients at the activation: one for each pass.

    Args:
        activation: The activation.
        copies: Copies of parts of it.
        together: Whether the passes of all copies are the same ones, of which each copy received a part.
    """
    gradients: list[Tensor] = []
    for copy in copies:
        for number, received in enumerate(copy.gradients):
            if together and number < len(gradients):
                gradient = gradients[number]
            else:
                gradient = torch.zeros_like(activation, dtype=received.dtype, memory_format=torch.preserve_format)
                gradients.append(gradient)
            offset = gradient.storage_offset() + copy.leaf.storage_offset() - activation.storage_offset()
            part = gradient.as_strided(copy.leaf.shape, copy.leaf.stride(), offset)
            part += whole(received)
    return gradients


def hand_on(
    activation: Tensor, copies: Sequence[DetachedCopy], calls: Sequence[LayerCall], together: bool
) -> list[tuple[LayerCall, Tensor]]:
    """Backpropagate from an activation what copies of parts of it received.

    Args:
        activation: The activation.
        copies: Copies of parts of it.
        calls: Calls of layers below it; each has an edge.
        together: As :func:`gradients_at`.

    Returns:
        Calls and the gradients at their outputs; a call comes once for each pass that reached it.
    """
    as_logits = OutputLoss(activation, activation.dim() - 1, activation.new_empty(0))
    passes = [backpropagate(as_logits, gradient, calls) for gradient in gradients_at(activation, copies, together)]
    return [
        (call, gradient) for sent in passes for call, gradient in zip(calls, sent, strict=True) if gradient is not None
    ]


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the last place of a tensor in its storage."""
    start = int(tensor.storage_offset())
    return start, start + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
