"""Which weights factors were collected on: a hash of each weight, and a few of its entries.

The hash tells whether a weight is the same, the entries tell how far another one is from it.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_curvature.storage.hashes import tensor_hash

_SAMPLE = 32
_HASH = re.compile(r"torch\.\w+ \[[\d, ]+\] [0-9a-f]{64}")

Fingerprint = Mapping[str, Any]
"""JSON: ``hash``, what ``tensor_hash`` returns, and ``sample``, entries at even distances."""


def fingerprint(weight: Any) -> Fingerprint | None:
    """Return the fingerprint of a layer's weight; None if it is not one plain parameter of finite numbers.

    >>> fingerprint(nn.Parameter(torch.eye(2)))["sample"]
    [1.0, 0.0, 0.0, 1.0]
    """
    if type(weight) is not nn.Parameter or weight.device.type == "meta" or not weight.numel():
        return None
    sample = _sample(weight)
    finite = bool(torch.isfinite(sample).all())
    return {"hash": tensor_hash(weight), "sample": sample.tolist()} if finite else None


def difference(recorded: Fingerprint, present: str, read: Callable[[], Tensor]) -> float | None:
    """Return how far a weight is from the recorded one, relative to its norm, by the sample.

    Args:
        recorded: The fingerprint of the weight that the factors were collected on.
        present: ``tensor_hash`` of the weight to compare with it.
        read: Returns the weight to compare; called if the hashes differ.

    Returns:
        None if the two are the same, or differ by what rounding to another dtype does, or cannot be compared (another
        shape, packed entries); 0 if they differ outside of the sample alone.
    """
    if recorded["hash"] == present:
        return None
    (dtype, shape), (present_dtype, present_shape) = (_kind(text) for text in (recorded["hash"], present))
    if shape != present_shape or dtype is None or present_dtype is None:
        return None
    old, new = torch.tensor(recorded["sample"], dtype=torch.float64, device="cpu"), _sample(read())
    if dtype != present_dtype:
        limits = [torch.finfo(dtype), torch.finfo(present_dtype)]
        eps, least = max(limit.eps for limit in limits), max(limit.eps * limit.tiny for limit in limits)
        if bool(((new - old).abs() <= eps * old.abs() + least).all()):
            return None
    change, norm = float((new - old).norm()), float(old.norm())
    return change / norm if norm else math.inf if change else 0.0


def is_fingerprint(value: Any) -> bool:
    """Tell whether what was read from a file is a fingerprint."""
    if not isinstance(value, dict) or value.keys() != {"hash", "sample"} or not isinstance(value["sample"], list):
        return False
    finite = all(type(entry) in (int, float) and abs(entry) < 1e300 for entry in value["sample"])
    return (
        finite
        and len(value["sample"]) <= _SAMPLE
        and isinstance(value["hash"], str)
        and (_HASH.fullmatch(value["hash"]) is not None)
    )


def _kind(text: str) -> tuple[torch.dtype | None, str]:
    """Return dtype and shape from the hash of a tensor; None for a dtype that is not one of plain floating numbers."""
    name, _, rest = text.partition(" ")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    plain = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
    return dtype if plain else None, rest.rpartition(" ")[0]


def _sample(weight: Tensor) -> Tensor:
    """Return entries of a weight at even distances, float64 on the CPU."""
    count = min(_SAMPLE, weight.numel())
    index = torch.arange(count, device=weight.device) * weight.numel() // max(count, 1)
    places = torch.unravel_index(index, weight.shape)
    return weight.detach()[places].cpu().double()
