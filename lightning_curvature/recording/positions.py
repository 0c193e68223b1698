"""Which positions of a layer count.

==================  ================================================================================
positions           those that count, of a linear layer
==================  ================================================================================
``"contributing"``  those whose output gradient is not exactly zero: without any mask it leaves out padding, the last
                    position of a language model, and the patches in the last block of a ViT
``"all"``           all
``"first"``         the first one of ``[batch, position, feature]``
``"mask:KEY"``      those of a ``[batch, position]`` mask that the batch holds under ``KEY``
==================  ================================================================================

A convolution counts every position: dead ReLUs and max-pooling make true zeros there.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature._checks import check_option
from lightning_curvature.recording.calls import LayerCall

POSITIONS = ("contributing", "all", "first")


def check_positions_rule(positions: str) -> None:
    """Raise ``ValueError`` if ``positions`` is neither one of ``POSITIONS`` nor the name of a mask."""
    if not str(positions).startswith("mask:"):
        check_option(positions, POSITIONS, "positions")


def counted_positions(
    positions: str, call: LayerCall, not_zero: Sequence[Tensor], count: int, mask: Tensor | None
) -> Tensor | None:
    """Return which positions of a call count, bool ``[n]``; None for all of them.

    Args:
        positions: The rule.
        call: Call of the layer.
        not_zero: Where the gradient at its output is not zero, bool ``[n]``, of each backward pass that reached it.
        count: Number n of its positions.
        mask: Mask of the batch, ``[batch, position]``.

    Raises:
        RuntimeError: If the layer's outputs, or the mask, do not have the shape that the rule needs.
    """
    device = call.inputs.device
    if positions == "all" or isinstance(call.module, nn.Conv2d):
        return None
    if positions == "contributing":
        if len(not_zero) == 1:
            return not_zero[0]
        return torch.stack(list(not_zero)).any(0) if not_zero else torch.zeros(count, dtype=torch.bool, device=device)
    if call.nested:
        raise RuntimeError(
            f"positions={positions!r}: layer {call.name!r} reads rows of several lengths (a nested tensor), which have "
            "no [batch, position]. Use 'contributing' or 'all'."
        )
    shape = call.output_shape[:-1]
    if positions == "first":
        if len(shape) > 2:
            raise RuntimeError(
                f"positions='first': layer {call.name!r} has outputs {list(call.output_shape)}, expected "
                "[batch, position, feature] or [batch, feature]."
            )
        return None if len(shape) == 1 else torch.arange(count, device=device) % shape[1] == 0
    if mask is None or mask.shape != shape:
        mask_shape = None if mask is None else list(mask.shape)
        raise RuntimeError(
            f"positions={positions!r}: layer {call.name!r} has positions {list(shape)}, the mask is {mask_shape}."
        )
    return mask.to(device).flatten().bool()


def batch_mask(batch: Any, key: str) -> Tensor:
    """Return the mask that a batch holds.

    Raises:
        RuntimeError: If it holds none under this key.
    """
    try:
        return torch.as_tensor(batch[key])
    except (KeyError, TypeError, IndexError):
        keys = list(batch) if isinstance(batch, dict) else type(batch).__name__
        raise RuntimeError(f"positions='mask:{key}': the batch has no {key!r}, found {keys}.") from None
