"""One call of a watched layer: what it read, and where its output is in the autograd graph."""

from dataclasses import dataclass, field

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
