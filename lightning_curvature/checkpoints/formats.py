"""The format of a checkpoint, told by its path."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.huggingface import HuggingFaceFolder
from lightning_curvature.checkpoints.outputs import ARCHIVES, SAFETENSORS, ending
from lightning_curvature.checkpoints.safetensors import SafetensorsFile, looks_like_safetensors, tensor_hash

__all__ = [
    "Checkpoint",
    "checkpoint_hashes",
    "content_hash",
    "open_checkpoint",
    "tensor_hash",
    "tensor_hashes",
    "values_hash",
]

Checkpoint = ArchiveFile | HuggingFaceFolder | SafetensorsFile
_READERS = 8


def open_checkpoint(path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Open a Hugging Face folder, a ``.safetensors`` file, or a file of ``torch.save``.

    Args:
        path: Folder or file.
        allow_globals: Names of classes that a file of ``torch.save`` may hold beside tensors and primitives.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is of none of these formats.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if path.is_dir():
        return HuggingFaceFolder(path)
    if ending(path) == SAFETENSORS or (ending(path) not in ARCHIVES and looks_like_safetensors(path)):
        return SafetensorsFile(path)
    return ArchiveFile(path, allow_globals)


def tensor_hashes(names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, str]:
    """Return dtype, shape and SHA-256 of each tensor as one text, with one tensor per core in memory.

    Args:
        names: Names of the tensors.
        read: Returns a tensor by its name; called from several threads.
    """
    names = sorted(names)
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing lets other threads run
        return dict(zip(names, threads.map(lambda name: tensor_hash(read(name)), names), strict=True))


def checkpoint_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return :func:`tensor_hash` of each tensor of a checkpoint; tensors pass through memory in chunks."""
    names = sorted(checkpoint.shapes())
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _READERS)) as threads:  # hashing lets other threads run
        return dict(zip(names, threads.map(checkpoint.hash, names), strict=True))


def content_hash(hashes: Mapping[str, str]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and bytes of tensors, given their :func:`tensor_hashes`.

    It does not depend on the file's name, format or layout, which the hash of a file of ``torch.save`` does.
    """
    return hashlib.sha256("\0".join(f"{name}\0{hashes[name]}" for name in sorted(hashes)).encode()).hexdigest()


def values_hash(hashes: Mapping[str, str]) -> str:
    """Return a SHA-256 over the different tensors, whatever they are called and however often they are tied."""
    return hashlib.sha256("\0".join(sorted(set(hashes.values()))).encode()).hexdigest()
