"""The format of a checkpoint, told by its path."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.huggingface import HuggingFaceFolder
from lightning_curvature.checkpoints.safetensors import SafetensorsFile, as_bytes

Checkpoint = ArchiveFile | HuggingFaceFolder | SafetensorsFile


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
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    return ArchiveFile(path, allow_globals)


def content_hash(names: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """Return a SHA-256 over names, dtypes, shapes and hashes of tensors, with one tensor per core in memory.

    It does not depend on the file's name, format or layout, which the hash of a file of ``torch.save`` does.

    Args:
        names: Names of the tensors.
        read: Returns a tensor by its name; called from several threads.
    """

    def describe(name: str) -> str:
        tensor = read(name)
        return f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0{hashlib.sha256(as_bytes(tensor)).hexdigest()}\0"

    with ThreadPoolExecutor(os.cpu_count()) as threads:  # hashing lets other threads run
        return hashlib.sha256("".join(threads.map(describe, sorted(names))).encode()).hexdigest()
