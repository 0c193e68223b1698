"""Edited siblings of the checkpoints that a Lightning Trainer saves."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_curvature.ranks import Ranks

Checkpoint = dict[str, Any]


class Sibling(Protocol):
    """What is saved beside every checkpoint. Both methods are collectives."""

    def edited(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Return the edited copy of a checkpoint, or None if there is nothing to edit with yet."""

    def factors_writer(self) -> Callable[[Path], None] | None:
        """Return what writes the factors and the state of their collection; None if there is nothing to write.

        Only that of the first process is called.
        """


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


class Siblings:
    """Saves edited copies and factors beside every checkpoint of a strategy, and removes them with it.

    A callback is told neither the path of a checkpoint nor of its deletion, and a checkpoint IO runs on the first
    process alone, and not at all where each process saves its shard. The strategy's own methods see everything on all
    processes, so this takes the place of three of them.

    Args:
        strategy: The strategy, with its processes running.

    Attributes:
        ranks: The processes.
        owners: What is saved beside every checkpoint, by the mark in its name.
        loaded: Path of the checkpoint that was loaded last.
        failed: Whether the run has failed: other processes may not be there any more.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.ranks = Ranks()
        if isinstance(strategy, ParallelStrategy):  # others run on one process, also where a process group is running
            part = strategy.distributed_sampler_kwargs
            self.ranks = Ranks.joined(part["rank"], part["num_replicas"], strategy.root_device)
        self.owners: dict[str, Sibling] = {}
        self.loaded: str | None = None
        self.failed = False
        self._save, self._load, self._remove = (
            strategy.save_checkpoint, strategy.load_checkpoint, strategy.remove_checkpoint
        )  # fmt: skip
        vars(strategy).update(
            save_checkpoint=self.save_checkpoint,
            load_checkpoint=self.load_checkpoint,
            remove_checkpoint=self.remove_checkpoint,
        )

    @classmethod
    def of(cls, strategy: Strategy) -> "Siblings":
        """Return the siblings of a strategy, new ones if it has none yet."""
        found = getattr(strategy.save_checkpoint, "__self__", None)
        return found if isinstance(found, cls) else cls(strategy)

    def save_checkpoint(self, checkpoint: Checkpoint, filepath: str | Path, storage_options: Any | None = None) -> None:
        """Save the siblings of a checkpoint, then the checkpoint as it is.

        In this order a checkpoint is never without its siblings, and ``ckpt_path="last"``, the latest file whose name
        begins with "last", is never an edited one. A sibling that cannot be written (a full disk) costs a warning, and
        never the checkpoint.
        """
        hidden = Path(filepath).name.startswith(".")  # what Lightning's tuners save for a moment
        lost = self.failed and not self.ranks.all_here()
        if lost:
            rank_zero_warn(
                f"{os.fspath(filepath)} is saved while the run fails, and not all of its processes take part: it has "
                "no edited copy, and no factors with which a resumed run would go on."
            )
        try:
            for name, owner in self.owners.items() if not (hidden or lost) else ():
                try:
                    writer = owner.factors_writer()
                    self.ranks.first(lambda name=name, writer=writer: _write(writer, factors_path(filepath, name)))  # type: ignore[misc]
                    edited, path = owner.edited(checkpoint), sibling(filepath, f"-{name}")
                    if edited is None:
                        self._remove_if_there(path)  # of an older run
                    else:
                        self._save(edited, path, storage_options)
                except OSError as error:
                    rank_zero_warn(
                        f"A sibling of {os.fspath(filepath)} could not be written ({error}); the checkpoint itself is "
                        "not affected."
                    )
        finally:
            self._save(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> Checkpoint:
        """Load a checkpoint, and remember from where."""
        self.loaded = os.fspath(checkpoint_path)
        return self._load(checkpoint_path, *args, **kwargs)

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

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint and its siblings.

        A checkpoint that an asynchronous plugin has not written yet is not removed by it, and keeps its siblings.
        """
        there = self.ranks.rank == 0 and get_filesystem(filepath).exists(filepath)
        self._remove(filepath)
        if there:
            for name in self.owners:
                self._remove_if_there(sibling(filepath, f"-{name}"))
                _delete(factors_path(filepath, name))

    def _remove_if_there(self, path: str) -> None:
        if self.ranks.rank == 0 and get_filesystem(path).exists(path):
            self._remove(path)


def _write(writer: Callable[[Path], None] | None, path: str) -> None:
    files = get_filesystem(path)
    if writer is None:
        _delete(path)
    elif isinstance(files, LocalFileSystem):
        writer(Path(path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            writer(local := Path(folder, "factors.safetensors"))
            files.put_file(local, path)


def _delete(path: str) -> None:
    if get_filesystem(path).exists(path):
        get_filesystem(path).rm(path)
