"""What a stored weight must be to be edited."""

import torch
from torch import Tensor

from lightning_curvature.factors.decomposition import FaultyLayerError
from lightning_curvature.layers.kinds import as_matrix


def weight_matrix(name: str, stored: Tensor, shape: tuple[int, int], transposed: bool) -> Tensor:
    """Return a stored weight as a matrix ``[d_out, d_in]``, if it can be edited.

    Args:
        name: Layer, for errors.
        stored: The weight in its stored layout.
        shape: The shape ``(d_out, d_in)`` that the factors are for.
        transposed: Whether the weight is stored as ``[d_in, d_out]``.

    Raises:
        ValueError: If the weight is quantized or on the meta device, or the factors are for another shape.
        FaultyLayerError: A ``ValueError``; if the weight is no matrix, or holds NaN or infinite values.
    """
    if not stored.is_floating_point() or stored.dtype.itemsize < 2:
        raise ValueError(
            f"Layer {name!r}: its weight is packed or quantized ({stored.dtype}, {list(stored.shape)}), and its "
            "entries cannot be edited. Edit the model in full precision, and quantize it afterwards."
        )
    if stored.device.type == "meta":
        raise ValueError(f"Layer {name!r}: its weight is on the meta device and has no entries. Load it first.")
    if stored.dim() < 2:
        raise FaultyLayerError(f"Layer {name!r}: its weight is no matrix, it has the shape {list(stored.shape)}.")
    if not bool(torch.isfinite(stored).all()):
        raise FaultyLayerError(f"Layer {name!r}: its weight holds NaN or infinite values.")
    matrix = as_matrix(stored, transposed)
    if tuple(matrix.shape) != shape:
        raise ValueError(
            f"Layer {name!r}: factors are for a {list(shape)} weight, the module has {list(matrix.shape)}. Were they "
            "collected on another model?"
        )
    return matrix
