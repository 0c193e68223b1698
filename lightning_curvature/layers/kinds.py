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

from lightning_curvature.distributed import local_part


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is a ``transformers.pytorch_utils.Conv1D`` (without importing transformers)."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(module, pytorch_utils.Conv1D)


def is_matmul(module: nn.Module) -> bool:
    """Tell whether a module multiplies rows by one weight matrix: ``nn.Linear`` or ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _is_of_editable_kind(module: nn.Module) -> bool:
    return is_matmul(module) or isinstance(module, nn.Conv2d)


def fused_experts(module: nn.Module) -> list[str]:
    """Return the names of the 3-D parameters that hold all experts of a mixture, ``[experts, ., .]``."""
    if "expert" not in type(module).__name__.lower():
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def is_lazy(module: nn.Module) -> bool:
    """Tell whether a layer's weight has no shape yet: a lazy layer that has not run."""
    weight: Any = module._parameters.get("weight")  # to read one that is computed may change its state
    return nn.parameter.is_lazy(weight)


def has_lazy(root: nn.Module) -> bool:
    """Tell whether a network holds lazy layers, which have no shape before they run, of a kind that can be edited."""
    return any(_is_of_editable_kind(module) and is_lazy(module) for module in root.modules())


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer's weight is packed or quantized, so that its entries are no floating-point numbers."""
    return _packing(module) is not None


def _packing(module: nn.Module) -> str | None:
    """Return how a weight is stored if it is no matrix of floating-point numbers; None if it is one."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        return type(weight).__name__
    if is_lazy(module):
        return None
    stored = local_part(weight)
    kind = type(stored)
    # A subclass of Tensor with its own operators may store something else than entries, whatever its dtype says.
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{kind.__name__}, {stored.dtype}"
    if stored.layout is not torch.strided:
        return f"{stored.layout}"
    if not stored.is_floating_point() or stored.dtype.itemsize == 1:
        return f"{stored.dtype}"
    shape = list(as_matrix(weight, is_conv1d(module)).shape)
    expected = list(matrix_shape(module))
    return None if shape == expected else f"{type(stored).__name__} {shape} in a layer of {expected}"


def refusal(module: nn.Module) -> str | None:
    """Return why a layer cannot be edited although its kind suggests it, or None."""
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"it is a grouped convolution (groups={module.groups}), whose factors are block-diagonal"
    if isinstance(module, (nn.Conv1d, nn.Conv3d, nn.modules.conv._ConvTransposeNd, nn.Bilinear)):
        return f"{type(module).__name__} is not supported (nn.Linear, transformers Conv1D and nn.Conv2d are)"
    if fused := fused_experts(module):
        return f"it keeps its experts in fused 3-D parameters ({', '.join(fused)}), which have no module of their own"
    return _weight_refusal(module) if _is_of_editable_kind(module) else None


def _weight_refusal(module: Any) -> str | None:
    """Return why the weight of a layer cannot be edited although its kind can be, or None."""
    if parametrize.is_parametrized(module, "weight"):
        parametrizations: Any = module.parametrizations["weight"]
        kinds = ", ".join(type(parametrization).__name__.strip("_") for parametrization in parametrizations)
        return (
            f"its weight is computed by a parametrization ({kinds}); remove it with "
            "parametrize.remove_parametrizations(module, 'weight') first"
        )
    if computed := _recomputed(module):
        return computed
    if "weight" not in module._parameters:
        kind = type(getattr(module, "weight", None)).__name__
        what = "a buffer" if "weight" in module._buffers else f"an attribute ({kind}) that is set elsewhere"
        return f"its weight is no parameter of its own but {what}; make it an nn.Parameter"
    if module.weight is None:
        return "its weight is None"
    if packing := _packing(module):
        return f"its weight is packed or quantized ({packing})"
    if module.weight.is_meta:
        return "its weight is on the meta device and has no values; load or initialise the weights first"
    return None


def _recomputed(module: nn.Module) -> str | None:
    """Return what computes a weight before each forward pass, and how to stop it; None if nothing does."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if getattr(hook, "name", "weight") == "weight"]
    names = {type(hook).__name__ for hook in hooks}
    tensors = {*module._parameters, *module._buffers}
    if "WeightNorm" in names or {"weight_g", "weight_v"} <= tensors:
        return (
            "its weight is computed before each forward pass by torch.nn.utils.weight_norm; remove that with "
            "torch.nn.utils.remove_weight_norm(module) first"
        )
    if "SpectralNorm" in names or {"weight_orig", "weight_u"} <= tensors:
        return (
            "its weight is computed before each forward pass by torch.nn.utils.spectral_norm; remove that with "
            "torch.nn.utils.remove_spectral_norm(module) first"
        )
    if "weight_orig" in tensors:
        return "it is pruned (torch.nn.utils.prune); make that permanent with prune.remove(module, 'weight') first"
    return None


def is_editable(module: nn.Module) -> bool:
    """Tell whether :class:`CurvatureEditor` can edit this layer's weight."""
    return _is_of_editable_kind(module) and refusal(module) is None


def matrix_shape(module: Any) -> tuple[int, int]:
    """Return the shape ``(d_out, d_in)`` of an editable layer's weight, also where the weight itself is sharded.

    Raises:
        RuntimeError: If the layer is lazy and has not run.
    """
    if is_lazy(module):
        raise RuntimeError(f"{type(module).__name__} has no shape before it runs; run one batch through the network.")
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
    patches = F.unfold(padded(module, images), module.kernel_size, dilation=module.dilation, stride=module.stride)
    return rearrange(patches, "b d n -> (b n) d")


def padding_of(module: nn.Conv2d) -> list[int]:
    """Return the padding of a convolution as ``F.pad`` wants it: the last dimension first."""
    pad: list[int] = []
    for axis in (1, 0):
        if module.padding == "same":
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            pad += [total // 2, total - total // 2]
        elif module.padding != "valid":
            pad += [int(module.padding[axis])] * 2
        else:
            pad += [0, 0]
    return pad


def padded(module: nn.Conv2d, images: Tensor) -> Tensor:
    """Return images with the padding of a convolution around them, ``[b, c, h, w]``; ``[c, h, w]`` becomes a batch."""
    images = images if images.dim() == 4 else images[None]
    pad = padding_of(module)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(images, pad, mode=mode) if any(pad) else images
