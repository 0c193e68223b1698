"""SHA-256 of tensors, and of the content of whole checkpoints."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_CHUNK = 2**22  # bytes


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, little-endian and row-major, as safetensors stores them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def tensor_hash(tensor: Tensor) -> str:
    """Return dtype, shape and SHA-256 of a tensor as one text."""
    digest = hashlib.sha256()
    for piece in _pieces(tensor.detach()):  # a copy of a whole transposed tensor would take as much memory again
        digest.update(as_bytes(piece))
    return f"{tensor.dtype} {list(tensor.shape)} {digest.hexdigest()}"


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the pieces of a tensor in row-major order; each is contiguous, or small."""
    if tensor.is_contiguous() or tensor.nbytes <= _CHUNK:
        yield tensor
    else:
        for row in tensor:
            yield from _pieces(row)


def tensor_hashes(names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, str]:
    """Return :func:`tensor_hash` of each tensor, with one tensor per core in memory.

    Args:
        names: Names of the tensors.
        read: Returns a tensor by its name; called from several threads.
    """
    names = sorted(names)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing lets other threads run
        return dict(zip(names, threads.map(lambda name: tensor_hash(read(name)), names), strict=True))


def content_hash(hashes: Mapping[str, str]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes of tensors, given their :func:`tensor_hashes`.

    It depends on the tensors alone. The hash of a file depends on its format and layout, too.
    """
    return hashlib.sha256("\0".join(f"{name}\0{hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def values_hash(hashes: Mapping[str, str]) -> str:
    """Return a SHA-256 over tensors without their names, given their hashes; tensors with the same hash count once."""
    return hashlib.sha256("\0".join(sorted(set(hashes.values()))).encode()).hexdigest()
