"""One call of a watched layer: what it read, and where its output is in the autograd graph."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

OVERWRITTEN = (
    "Layer {!r}: its input was changed in place after the layer read it, so it can no longer be measured. Replace the "
    "in-place operation (x += y becomes x = x + y)."
)


@dataclass(eq=False)
class LayerCall:
    """One call of a watched layer.

    Args:
        name: Module name of the layer.
        module: The layer.
        inputs: What it read, detached.
        version: Version counter of the input at the time of the call.
        edge: Its output in the autograd graph; None if the output needs no gradient.
        output_shape: Shape of its output.
        output_dtype: Dtype of its output.
        nested: Whether it read rows of several lengths (a nested tensor), which are there one after the other.
        arrived: Gradients of the training loss that arrived at the output (only if the tap watches them).
    """

    name: str
    module: nn.Module
    inputs: Tensor
    version: int
    edge: GradientEdge | None
    output_shape: torch.Size
    output_dtype: torch.dtype
    nested: bool = False
    arrived: list[Tensor] = field(default_factory=list)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that the training's backward sent to the output, or None."""
        return sum(self.arrived[1:], self.arrived[0]) if self.arrived else None

    def check_input(self) -> None:
        """Raise if the input was overwritten after the layer read it."""
        if version_of(self.inputs) != self.version:
            raise RuntimeError(OVERWRITTEN.format(self.name))


def version_of(tensor: Tensor) -> int:
    """Return the version counter of a tensor, which operations in place raise; -1 where torch keeps none."""
    return -1 if tensor.is_inference() else tensor._version


def is_transformed(value: Any) -> bool:
    """Tell whether a tensor belongs to a ``torch.func`` transform, and has no place in the autograd graph."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def check_call(name: str, inputs: Any, output: Any) -> None:
    """Raise ``RuntimeError`` if a call of a layer is not what can be recorded."""
    for what, value in (("reads", inputs), ("returns", output)):
        if not isinstance(value, Tensor):
            raise RuntimeError(
                f"Layer {name!r} {what} a {type(value).__name__}, expected a tensor: its class does more than multiply "
                "its input by its weight. Leave it out of layers=."
            )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
        raise RuntimeError(
            f"Layer {name!r} runs while a CUDA graph is captured, whose replay calls no hook. Collect without CUDA "
            "graphs."
        )


@dataclass
class BatchGradients:
    """The inputs and gradients of one batch.

    Args:
        calls: Calls of the chosen layers.
        gradients: Of each call, the gradients at its output, from every backward pass that reached it.
        scales: Of each call, the factor of the products of its gradients: one over the number of passes, or the square
            of the gradients' unit (a scalar float64 tensor).
        mask: Mask of the batch, for ``positions="mask:KEY"``.
        share: Share of the positions that is used, chosen at random.
        seed: Seed of that choice.
        losses: For each layer, the loss positions behind its gradients (a scalar integer tensor). A layer that is not
            there has one for each of its positions.
    """

    calls: Sequence[LayerCall]
    gradients: Sequence[Sequence[Tensor]]
    scales: Sequence[float | Tensor] = ()
    mask: Tensor | None = None
    share: float = 1.0
    seed: int = 0
    losses: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that is read."""
        gradients = [gradient for received in self.gradients for gradient in received]
        return [*(call.inputs for call in self.calls), *gradients, *([] if self.mask is None else [self.mask])]
