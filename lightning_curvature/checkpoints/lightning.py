"""Edited siblings of the checkpoints that a Lightning Trainer saves."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

Checkpoint = dict[str, Any]


def sibling(path: str | Path, mark: str) -> str:
    """Return the path of a checkpoint's sibling.

    >>> sibling("runs/last.ckpt", "-edited")
    'runs/last-edited.ckpt'
    """
    folder, slash, name = os.fspath(path).rpartition("/")  # the path may be a URL
    stem, suffix = (name.removesuffix(Path(name).suffix), Path(name).suffix)
    return f"{folder}{slash}{stem}{mark}{suffix}"


class SiblingCheckpointIO(CheckpointIO):
    """Saves an edited copy beside every checkpoint, and removes it with it.

    A callback is told neither the path of a checkpoint nor of its deletion; the checkpoint IO is.

    Args:
        inner: The checkpoint IO that reads and writes.
        edit: Returns the edited copy of a checkpoint, or None if there is nothing to edit with yet.
    """

    MARK = "-edited"

    def __init__(self, inner: CheckpointIO, edit: Callable[[Checkpoint], Checkpoint | None]) -> None:
        self.inner = inner
        self.edit = edit

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: Any | None = None) -> None:
        """Save a checkpoint as it is, then its edited sibling."""
        self.inner.save_checkpoint(checkpoint, path, storage_options)
        edited = self.edit(checkpoint)
        if edited is not None:
            self.inner.save_checkpoint(edited, sibling(path, self.MARK), storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> Checkpoint:
        """Load a checkpoint."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its edited sibling."""
        self.inner.remove_checkpoint(path)
        edited = sibling(path, self.MARK)
        if get_filesystem(edited).exists(edited):
            self.inner.remove_checkpoint(edited)

    def teardown(self) -> None:
        """Let the inner checkpoint IO finish."""
        self.inner.teardown()
