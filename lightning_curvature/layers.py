r"""Which layers can be edited, and how each kind is seen as a matrix product.

Every layer is ``Y = X W^T`` over rows: inputs ``X: [n, d_in]``, output gradients ``[n, d_out]`` and a weight
``W: [d_out, d_in]``. One row is one *position*: a token, a patch, or a pixel of a convolution's output.

========================  ==========================  ==================================
layer                     stored weight               rows
========================  ==========================  ==================================
``nn.Linear``             ``[d_out, d_in]``           leading dimensions, flattened
transformers ``Conv1D``   ``[d_in, d_out]``           leading dimensions, flattened
``nn.Conv2d``             ``[d_out, c, kh, kw]``      batch and output pixels, flattened;
                                                      ``d_in = c * kh * kw``
========================  ==========================  ==================================
"""

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrize


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is a ``transformers.pytorch_utils.Conv1D`` (without importing transformers)."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_matmul(module: nn.Module) -> bool:
    """Tell whether a module multiplies rows by one weight matrix: ``nn.Linear`` or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def fused_experts(module: nn.Module) -> list[str]:
    """Return the names of parameters in which a mixture of experts keeps all its experts, ``[experts, ., .]``."""
    if "expert" not in type(module).__name__.lower():
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer's weight is packed or quantized, so that its entries are no floating-point numbers."""
    weight = module.weight
    return not (isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1)


def refusal(module: nn.Module) -> str | None:
    """Return why a layer cannot be edited although its kind suggests it, or None."""
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it is a grouped convolution (groups={module.groups}), whose factors are block-diagonal"
    if isinstance(module, (nn.Conv1d, nn.Conv3d, nn.modules.conv._ConvTransposeNd, nn.Bilinear)):
        return f"{type(module).__name__} is not supported (nn.Linear, transformers Conv1D and nn.Conv2d are)"
    if fused := fused_experts(module):
        return f"it keeps its experts in fused 3-D parameters ({', '.join(fused)}), which have no module of their own"
    if not (is_matmul(module) or isinstance(module, nn.Conv2d)):
        return None
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is computed by a parametrization; remove it with parametrize.remove_parametrizations first"
    if hasattr(module, "weight_orig"):
        return "it is pruned (torch.nn.utils.prune); make that permanent with prune.remove(module, 'weight') first"
    if is_packed(module):
        return f"its weight is packed or quantized ({getattr(module.weight, 'dtype', type(module.weight).__name__)})"
    return None


def is_editable(module: nn.Module) -> bool:
    """Tell whether :class:`CurvatureEditor` can edit this layer's weight."""
    return (is_matmul(module) or isinstance(module, nn.Conv2d)) and refusal(module) is None


def matrix_shape(module: Any) -> tuple[int, int]:
    """Return the shape ``(d_out, d_in)`` of an editable layer's weight, also where the weight itself is sharded."""
    if isinstance(module, nn.Conv2d):
        return module.out_channels, module.in_channels * math.prod(module.kernel_size)
    if is_conv1d(module):
        return module.nf, module.nx
    return module.out_features, module.in_features


def as_matrix(weight: Tensor, transposed: bool = False) -> Tensor:
    """View a stored weight as ``[d_out, d_in]``; ``transposed`` for ``Conv1D``, which stores ``[d_in, d_out]``."""
    return weight.T if transposed else weight.flatten(1)


def from_matrix(matrix: Tensor, like: Tensor, transposed: bool = False) -> Tensor:
    """Undo :func:`as_matrix`: the stored layout, dtype and device of ``like``, as a new tensor."""
    stored = matrix.T if transposed else matrix.view(like.shape)
    return stored.to(like, copy=True).contiguous()


def input_rows(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return a layer's input as rows ``[n, d_in]``, in the order of its output's positions."""
    if isinstance(module, nn.Conv2d):
        return conv_patches(module, inputs)
    return inputs.reshape(-1, inputs.shape[-1])


def gradient_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """Return a layer's output gradient as rows ``[n, d_out]``."""
    if isinstance(module, nn.Conv2d):
        return rearrange(gradient, "... c h w -> (... h w) c")
    return gradient.reshape(-1, gradient.shape[-1])


def num_rows(module: nn.Module, inputs: Tensor, output_shape: torch.Size) -> int:
    """Return how many rows :func:`input_rows` and :func:`gradient_rows` have."""
    if isinstance(module, nn.Conv2d):
        return math.prod(output_shape) // module.out_channels
    return math.prod(inputs.shape[:-1])


def conv_patches(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Return the patches that a convolution multiplies, ``[n, c * kh * kw]``, any stride, dilation and padding.

    Args:
        module: A convolution with ``groups=1``.
        images: ``[b, c, h, w]`` or ``[c, h, w]``.
    """
    images = images if images.dim() == 4 else images[None]
    pad: list[int] = []  # last dimension first, as F.pad wants it
    for axis in (1, 0):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            pad += [total // 2, total - total // 2]
        elif module.padding != "valid":
            pad += [int(module.padding[axis])] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    images = F.pad(images, pad, mode=mode) if any(pad) else images
    patches = F.unfold(images, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return rearrange(patches, "b d n -> (b n) d")
