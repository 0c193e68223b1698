"""The format of a checkpoint, told by its path."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.huggingface import HuggingFaceFolder
from lightning_curvature.checkpoints.safetensors import SafetensorsFile
from lightning_curvature.storage.outputs import ARCHIVES, SAFETENSORS, ending
from lightning_curvature.storage.sniff import looks_like_safetensors

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


def checkpoint_hashes(checkpoint: Checkpoint) -> dict[str, str]:
    """Return :func:`tensor_hash` of each tensor of a checkpoint; tensors pass through memory in chunks."""
    names = sorted(checkpoint.shapes())
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _READERS)) as threads:  # hashing lets other threads run
        return dict(zip(names, threads.map(checkpoint.hash, names), strict=True))
