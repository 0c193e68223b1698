"""The format of a checkpoint, told by its path."""

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_curvature.checkpoints.adapter import AdapterFolder, is_adapter
from lightning_curvature.checkpoints.archive import ArchiveFile
from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.huggingface import HuggingFaceFolder
from lightning_curvature.checkpoints.safetensors import SafetensorsFile
from lightning_curvature.storage.outputs import (
    ARCHIVES,
    DELTA,
    FACTORS,
    SAFETENSORS,
    ending,
)
from lightning_curvature.storage.sniff import looks_like_safetensors


def open_checkpoint(path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Open a Hugging Face folder, the folder of a LoRA adapter, a ``.safetensors`` file, or a file of ``torch.save``.

    Args:
        path: Folder or file.
        allow_globals: Names of classes that a file of ``torch.save`` may hold besides tensors and primitives.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is of none of these formats.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder.")
    if path.is_dir():
        return AdapterFolder(path) if is_adapter(path) else HuggingFaceFolder(path)
    if ending(path) == SAFETENSORS or (ending(path) not in ARCHIVES and looks_like_safetensors(path)):
        return SafetensorsFile(path)
    return ArchiveFile(path, allow_globals)


def open_weights(path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> Checkpoint:
    """Open a checkpoint to edit; arguments and errors as :func:`open_checkpoint`.

    Raises:
        ValueError: Also if it is a file of factors, or a delta.
    """
    checkpoint = open_checkpoint(path, allow_globals)
    if isinstance(checkpoint, SafetensorsFile):
        if DELTA in checkpoint.metadata:
            raise ValueError(f"{path} is a delta, not a checkpoint: revert and apply take it as --delta.")
        if FACTORS in checkpoint.metadata:
            raise ValueError(f"{path} holds K-FAC factors, not weights: edit takes it as --factors.")
    return checkpoint
