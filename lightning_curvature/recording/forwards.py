"""Whether a layer computes what its kind says: rows times weight plus bias.

A subclass of ``nn.Linear`` or ``nn.Conv2d`` may have a ``forward`` of its own (a normalised input, an activation
inside, padding computed there), and hooks may change what it returns. Its factors would be those of another product.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lightning_curvature.distributed import whole
from lightning_curvature.layers.kinds import as_matrix, gradient_rows, is_conv1d, matrix_shape, padded, padding_of

_ROWS, _OUTPUTS = 64, 256  # of the product that is compared
_TF32 = 2.0**-10  # unit of float32 products on GPUs that round their inputs


def rows_agree(module: nn.Module, inputs: Tensor, output_shape: torch.Size) -> bool:
    """Tell whether a layer's input and output have the rows that :mod:`lightning_curvature.layers.kinds` gives them.

    Args:
        module: A layer that can be edited.
        inputs: What it read.
        output_shape: Shape of what it returned.
    """
    d_out, d_in = matrix_shape(module)
    if not isinstance(module, nn.Conv2d):
        rows = math.prod(inputs.shape[:-1]), math.prod(output_shape[:-1])
        return (
            inputs.dim() > 0
            and len(output_shape) > 0
            and rows[0] == rows[1]
            and (
                inputs.shape[-1],
                output_shape[-1],
            )
            == (d_in, d_out)
        )
    if inputs.dim() not in (3, 4) or inputs.shape[-3] != module.in_channels:
        return False
    return tuple(output_shape) == (*inputs.shape[:-3], d_out, *_output_size(module, inputs))


def check_forward(module: nn.Module, inputs: Tensor, output: Tensor) -> str | None:
    """Return why a layer's output is not its input's rows times its weight plus its bias; None if it is.

    A few rows and outputs are computed again, and compared at the precision of what was computed: that of the coarsest
    dtype of input, weight, output and autocast. Rows that hold NaN or infinite values are passed over.

    Args:
        module: A layer that can be edited.
        inputs: What it read.
        output: What its ``forward`` returned, before any hook.
    """
    if not isinstance(output, Tensor):
        return f"it returns a {type(output).__name__}{_whose(module)}"
    if inputs.layout is torch.jagged and output.layout is torch.jagged:
        inputs, output = inputs.values(), output.values()
    if not rows_agree(module, inputs, output.shape):
        return f"it makes an output of {list(output.shape)} of an input of {list(inputs.shape)}{_whose(module)}"
    unit = _unit(module, inputs, output)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        rows, outputs = _sample_rows(module, whole(inputs.detach()), whole(output.detach()))
        return _difference(module, rows, outputs, unit)


def _difference(module: Any, rows: Tensor, outputs: Tensor, unit: float) -> str | None:
    """Compare outputs ``[n, d_out]`` with the product of rows ``[n, d_in]`` and weight."""
    d_out, d_in = matrix_shape(module)
    columns = _spread(d_out, _OUTPUTS, rows.device)
    weight = as_matrix(whole(module.weight.detach()), is_conv1d(module))[columns]
    bias = None if module.bias is None else whole(module.bias.detach())[columns]
    wide = torch.promote_types(outputs.dtype, torch.float32)
    rows, weight, outputs = rows.to(wide), weight.to(wide), outputs[:, columns].to(wide)
    product = rows @ weight.T
    expected = product if bias is None else product + bias.to(wide)
    finite = torch.isfinite(outputs).all(1) & torch.isfinite(expected).all(1)
    rows, product, expected, outputs = rows[finite], product[finite], expected[finite], outputs[finite]
    # Rounding errors of a sum of products are as large as a term of it times the unit, with any sign.
    size = (rows.square() @ weight.square().T + expected.square()).sum().sqrt()
    error = (outputs - expected).norm()
    tolerance = 4 * unit + math.sqrt(d_in) * torch.finfo(wide).eps
    if bool(error > tolerance * size):
        relative = float(error / size)
        return (
            f"its forward does not multiply its input by its weight: it differs by {relative:.2g} of it{_whose(module)}"
        )
    if len(rows) and not bool(product.any()) and _overrides_forward(module):
        return f"its forward cannot be told from another, since its input or its weight is zero{_whose(module)}"
    return None


def _sample_rows(module: nn.Module, inputs: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return a few rows of a layer's input, and the same rows of its output."""
    if not isinstance(module, nn.Conv2d):
        where = _spread(math.prod(inputs.shape[:-1]), _ROWS, inputs.device)
        return inputs.reshape(-1, inputs.shape[-1])[where], gradient_rows(module, output)[where]
    # The first and the last row of pixels of the first and the last image: all four borders.
    images, maps = (part if part.dim() == 4 else part[None] for part in (inputs, output))
    ends = [0, -1] if len(images) > 1 else [0]
    images, maps = padded(module, images[ends]), maps[ends]
    height, reach = maps.shape[-2], module.dilation[0] * (module.kernel_size[0] - 1) + 1
    rows, outputs = [], []
    for line in sorted({0, height - 1}):
        start = line * module.stride[0]
        strip = images[:, :, start : start + reach]
        patches = F.unfold(strip, module.kernel_size, dilation=module.dilation, stride=module.stride)
        rows.append(rearrange(patches, "b d n -> (b n) d"))
        outputs.append(gradient_rows(module, maps[:, :, line : line + 1]))
    where = _spread(sum(map(len, rows)), 4 * _ROWS, inputs.device)
    return torch.cat(rows)[where], torch.cat(outputs)[where]


def _output_size(module: nn.Conv2d, inputs: Tensor) -> tuple[int, ...]:
    left_right, top_bottom = padding_of(module)[:2], padding_of(module)[2:]
    sizes = []
    for axis, pad in enumerate((top_bottom, left_right)):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        sizes.append((inputs.shape[axis - 2] + sum(pad) - reach) // module.stride[axis] + 1)
    return tuple(sizes)


def _unit(module: Any, inputs: Tensor, output: Tensor) -> float:
    """Return the relative spacing of the coarsest numbers that a layer computed with."""
    device = inputs.device.type
    dtypes = {inputs.dtype, output.dtype, module.weight.dtype}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    unit = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    if torch.float32 in dtypes and torch.get_float32_matmul_precision() == "medium":
        unit = max(unit, torch.finfo(torch.bfloat16).eps)
    elif torch.float32 in dtypes and (device != "cpu" or torch.get_float32_matmul_precision() == "high"):
        unit = max(unit, _TF32)
    return unit


def _spread(count: int, limit: int, device: torch.device) -> Tensor:
    """Return at most ``limit`` indices spread evenly over ``count``, the first and the last among them."""
    if count <= limit:
        return torch.arange(count, device=device)
    return torch.arange(limit, device=device) * (count - 1) // (limit - 1)


def _overrides_forward(module: nn.Module) -> bool:
    plain = (nn.Linear.forward, nn.Conv2d.forward)
    return "forward" in vars(module) or not (type(module).forward in plain or type(module).__name__ == "Conv1D")


def _whose(module: nn.Module) -> str:
    if "forward" in vars(module):
        return " (its forward was replaced)"
    return (
        f" (class {type(module).__name__} overrides forward)" if _overrides_forward(module) else " (a hook changes it)"
    )
