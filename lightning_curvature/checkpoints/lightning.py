"""Edited siblings of the checkpoints that a Lightning Trainer saves."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem

Checkpoint = dict[str, Any]


class Sibling(Protocol):
    """What is saved beside every checkpoint."""

    def edited(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Return the edited copy of a checkpoint, or None if there is nothing to edit with yet."""

    def save_factors_beside(self, path: Path) -> bool:
        """Write the factors and the state of their collection to a file; tell whether there was anything to write."""


def sibling(path: str | Path, mark: str, suffix: str | None = None) -> str:
    """Return the path of a checkpoint's sibling.

    >>> sibling("runs/last.ckpt", "-edited")
    'runs/last-edited.ckpt'
    >>> sibling("runs/last.ckpt", "-edited-factors", ".safetensors")
    'runs/last-edited-factors.safetensors'
    """
    folder, slash, name = os.fspath(path).rpartition("/")  # the path may be a URL
    extension = Path(name).suffix
    return f"{folder}{slash}{name.removesuffix(extension)}{mark}{extension if suffix is None else suffix}"


def factors_path(path: str | Path, name: str) -> str:
    """Return the path of the factors beside a checkpoint."""
    return sibling(path, f"-{name}-factors", ".safetensors")


class SiblingCheckpointIO(CheckpointIO):
    """Saves edited copies and factors beside every checkpoint, and removes them with it.

    A callback is told neither the path of a checkpoint nor of its deletion; the checkpoint IO is.

    Args:
        inner: The checkpoint IO that reads and writes.
    """

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner
        self.siblings: dict[str, Sibling] = {}
        self.loaded: str | None = None

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: Any | None = None) -> None:
        """Save the siblings of a checkpoint, then the checkpoint as it is.

        In this order a checkpoint is never without its siblings, and ``ckpt_path="last"``, the latest file whose name
        begins with "last", is never an edited one.
        """
        try:
            for name, owner in self.siblings.items():
                _save_factors(owner, factors_path(path, name))
                edited = owner.edited(checkpoint)
                if edited is None:
                    self._remove(sibling(path, f"-{name}"))  # of an older run
                else:
                    self.inner.save_checkpoint(edited, sibling(path, f"-{name}"), storage_options)
        finally:
            self.inner.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> Checkpoint:
        """Load a checkpoint, and remember from where."""
        self.loaded = os.fspath(path)
        return self.inner.load_checkpoint(path, *args, **kwargs)

    @contextmanager
    def loaded_factors(self, name: str) -> Iterator[Path | None]:
        """Yield the local path of the factors beside the checkpoint that was loaded last; None without them."""
        found = self.loaded or ""
        # With save_last="link" a checkpoint is a link; the factors lie beside what it points to.
        files = [factors_path(path, name) for path in (found, os.path.realpath(found))]
        file = next((file for file in files if get_filesystem(file).exists(file)), None)
        if file is None or isinstance(get_filesystem(file), LocalFileSystem):
            yield None if file is None else Path(file)
            return
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, Path(file).name)
            get_filesystem(file).get_file(file, local)
            yield local

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint and its siblings.

        A checkpoint that an asynchronous plugin has not written yet is not removed by it, and keeps its siblings.
        """
        if not get_filesystem(path).exists(path):
            self.inner.remove_checkpoint(path)
            return
        self.inner.remove_checkpoint(path)
        for name in self.siblings:
            self._remove(sibling(path, f"-{name}"))
            _delete(factors_path(path, name))

    def _remove(self, path: str) -> None:
        if get_filesystem(path).exists(path):
            self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Let the inner checkpoint IO finish."""
        self.inner.teardown()


def _save_factors(owner: Sibling, path: str) -> None:
    files = get_filesystem(path)
    if isinstance(files, LocalFileSystem):
        saved = owner.save_factors_beside(Path(path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            if saved := owner.save_factors_beside(local := Path(folder, "factors.safetensors")):
                files.put_file(local, path)
    if not saved:
        _delete(path)


def _delete(path: str) -> None:
    if get_filesystem(path).exists(path):
        get_filesystem(path).rm(path)
