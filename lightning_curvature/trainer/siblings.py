"""Edited siblings of the checkpoints that a Lightning Trainer saves."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_curvature.distributed import Ranks
from lightning_curvature.trainer.sibling_files import (
    absolute,
    apart,
    costs_a_warning,
    delete,
    factors_path,
    is_local,
    may_be_replaced,
    sibling,
    stamp_of,
    write_file,
)

CheckpointDict = dict[str, Any]
_EARLIER = 10_000_000  # nanoseconds: a copy is dated this much before its checkpoint, so that it is never the latest


class Saver(Protocol):
    """Says what is saved beside every checkpoint. All methods are collectives."""

    def copy_maker(self, checkpoint: CheckpointDict) -> "CopyMaker | None":
        """Return what makes the edited copy of a checkpoint; None, with a warning, if there is none that is right."""

    def factors_writer(self) -> Callable[[Path], None] | None:
        """Return what writes the factors and the state of their collection; None if there is nothing to write.

        Only that of the first process is called.
        """


class CopyMaker(Protocol):
    """What makes the edited copy of one checkpoint. All methods are collectives."""

    def __call__(self, checkpoint: CheckpointDict, path: str) -> CheckpointDict | None:
        """Return the copy of a checkpoint, given the copy's path; None, with a warning, if there is none."""

    def has_same_factors(self, other: "CopyMaker") -> bool:
        """Tell whether another maker takes the same factors."""

    def let_go(self, file: Path) -> None:
        """Hold the factors no longer: they are read from a file when they are needed."""


@dataclass
class _Waiting:
    """A checkpoint whose edited copies are made when training ends.

    Args:
        makers: What makes them, by the mark in their names.
        stamp: Size and time of the file when it was written, on the first process.
    """

    makers: dict[str, CopyMaker]
    stamp: tuple[int, int] | None


class Siblings:
    """Saves edited copies and factors beside every checkpoint of a strategy, and removes them with it.

    A callback is told neither the path of a checkpoint nor of its deletion, and a checkpoint IO runs on the first
    process alone, and not at all where each process saves its shard. The strategy's own methods see everything on all
    processes, so this takes the place of three of them.

    While a fit runs, one checkpoint often replaces another, and an edit can take longer than the steps between them. So
    edited copies of local files are made at the end, of the checkpoints that are still there.

    Args:
        strategy: The strategy, with its processes running.

    Attributes:
        ranks: The processes.
        savers: What is saved beside every checkpoint, by the mark in its name.
        loaded: Path of the checkpoint that was loaded last.
        loaded_step: Its step.
        failed: Whether the run has failed: other processes may not be there any more.
        waits: Whether a fit is running, at whose end :meth:`make_copies` is called.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.ranks = Ranks()
        if isinstance(strategy, ParallelStrategy):  # others run on one process, also where a process group is running
            part = strategy.distributed_sampler_kwargs
            self.ranks = Ranks.of_run(part["rank"], part["num_replicas"], strategy.root_device)
        self.savers: dict[str, Saver] = {}
        self.loaded: str | None = None
        self.loaded_step: int | None = None
        self.failed = self.waits = False
        self._waiting: dict[str, _Waiting] = {}
        self._saved: set[str] = set()
        self._reads_back = _writes_one_file(strategy)
        self._save, self._load, self._remove = (
            strategy.save_checkpoint,
            strategy.load_checkpoint,
            strategy.remove_checkpoint,
        )
        vars(strategy).update(
            save_checkpoint=self.save_checkpoint,
            load_checkpoint=self.load_checkpoint,
            remove_checkpoint=self.remove_checkpoint,
        )

    def watch(self, name: str, saver: Saver, in_fit: bool) -> None:
        """Let a saver save beside every checkpoint of the run that begins.

        Args:
            name: Mark of its files.
            saver: Says what is saved.
            in_fit: Whether a fit begins, at whose end the saver calls :meth:`make_copies`.
        """
        self.savers[name] = saver
        self.failed, self.waits = False, in_fit

    @classmethod
    def of(cls, strategy: Strategy) -> "Siblings":
        """Return the siblings of a strategy, new ones if it has none yet."""
        siblings = getattr(strategy.save_checkpoint, "__self__", None)
        return siblings if isinstance(siblings, cls) else cls(strategy)

    def save_checkpoint(
        self, checkpoint: CheckpointDict, filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save the siblings of a checkpoint, then the checkpoint as it is.

        In this order a checkpoint is never without its factors, and ``ckpt_path="last"``, the latest file whose name
        begins with "last", is never an edited one. A sibling that cannot be made or written costs a warning, and never
        the checkpoint.
        """
        path = absolute(os.fspath(filepath))
        hidden = Path(path).name.startswith(".")  # what Lightning's tuners save for a moment
        lost = self.failed and not self.ranks.all_here()
        if lost:
            rank_zero_warn(
                f"{path} is saved while the run fails, and not all of its processes take part: it has "
                "no edited copy, and no factors with which a resumed run would go on."
            )
        makers: dict[str, CopyMaker] = {}
        try:
            for name, saver in self.savers.items() if not (hidden or lost) else ():
                with costs_a_warning(path):
                    writer = saver.factors_writer()
                    self.ranks.first(partial(write_file, writer, factors_path(apart(path), name)))
                    maker, copy = saver.copy_maker(checkpoint), sibling(apart(path), f"-{name}")
                    self._check_free(copy)
                    if maker is None:
                        self._remove_if_there(copy)  # of an older run
                    elif self.waits and self._reads_back and is_local(path):
                        self._hold_one_set(name, maker)
                        makers[name] = maker
                        self._remove_if_there(copy)
                    elif (edited := maker(checkpoint, copy)) is not None:
                        self._save(edited, copy, storage_options)
        finally:
            self._save(checkpoint, filepath, storage_options)
            self._saved.add(path)
            self._waiting.pop(path, None)
            if makers:
                with costs_a_warning(path):
                    stamp = stamp_of(path) if self.ranks.rank == 0 and Path(path).is_file() else None
                    self._waiting[path] = _Waiting(makers, stamp)

    def _hold_one_set(self, name: str, maker: CopyMaker) -> None:
        """Let go of the factors of copies that wait, if a new copy takes others, since factors may be large.

        They lie in files beside the checkpoints, which one process reads back. With several, which may not see each
        other's files, what waits is edited now.
        """
        for path, waiting in list(self._waiting.items()):
            old = waiting.makers.get(name)
            if old is None or old.has_same_factors(maker):
                continue
            if self.ranks.size == 1:
                old.let_go(Path(factors_path(apart(path), name)))
            else:
                self._make_copy(path, name)

    def num_waiting(self, name: str) -> int:
        """Return how many checkpoints wait for an edited copy with a mark."""
        return sum(name in waiting.makers for waiting in self._waiting.values())

    def make_copies(self, name: str) -> None:
        """Make the edited copies with a mark that were left for the end of a fit. A collective."""
        for path, waiting in list(self._waiting.items()):
            if name in waiting.makers:
                self._make_copy(path, name)

    def _make_copy(self, path: str, name: str) -> None:
        """Make the edited copy of a checkpoint that was written before. A collective."""
        waiting = self._waiting[path]
        maker = waiting.makers.pop(name)
        if not waiting.makers:
            del self._waiting[path]
        with costs_a_warning(path):
            copy = sibling(apart(path), f"-{name}")
            self._check_free(copy)
            checkpoint = self._read_back(path, waiting.stamp)
            if checkpoint is not None and (edited := maker(checkpoint, copy)) is not None:
                self._save(edited, copy)
                if self.ranks.rank == 0:  # ckpt_path="last" takes the latest file
                    before = stamp_of(path)[1] - _EARLIER
                    os.utime(copy, ns=(before, before))

    def _read_back(self, path: str, stamp: tuple[int, int] | None) -> CheckpointDict | None:
        """Return a checkpoint that this run has written; its weights on the first process alone. A collective."""
        held: list[CheckpointDict] = []

        def read() -> int | None:
            if not Path(path).is_file() or stamp_of(path) != stamp:
                return None
            # The file is the one that this process wrote a moment ago, so it may hold what the run put into it.
            held.append(torch.load(path, map_location="cpu", weights_only=False, mmap=True))
            return int(held[0]["global_step"])

        step = self.ranks.first(read)
        if step is None:
            rank_zero_warn(f"{path} has changed since it was saved, or is gone: it has no edited copy.")
            return None
        return held[0] if held else {"state_dict": {}, "global_step": step}

    def _check_free(self, copy: str) -> None:
        """Raise ``FileExistsError`` if the path of a copy is that of somebody's own checkpoint. A collective."""
        if self.ranks.first(lambda: copy in self._saved or not may_be_replaced(copy)):
            raise FileExistsError(f"{copy} is a checkpoint of its own; give the callback another name=")

    def load_checkpoint(self, checkpoint_path: str | Path, *args: Any, **kwargs: Any) -> CheckpointDict:
        """Load a checkpoint, and remember from where."""
        self.loaded = os.fspath(checkpoint_path)
        checkpoint = self._load(checkpoint_path, *args, **kwargs)
        self.loaded_step = checkpoint.get("global_step")
        return checkpoint

    @contextmanager
    def loaded_factors(self, name: str) -> Iterator[Path | None]:
        """Yield the local path of the factors beside the checkpoint that was loaded last; None without them."""
        loaded = self.loaded or ""
        # With save_last="link" a checkpoint is a link; the factors lie beside what it points to.
        files = [factors_path(apart(path), name) for path in (loaded, os.path.realpath(loaded))]
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
        path = absolute(os.fspath(filepath))
        self._waiting.pop(path, None)
        self._saved.discard(path)
        if there:
            for name in self.savers:
                with costs_a_warning(path):
                    copy = sibling(apart(path), f"-{name}")
                    if copy not in self._saved:
                        self._remove_if_there(copy)
                    delete(factors_path(apart(path), name))

    def _remove_if_there(self, path: str) -> None:
        if self.ranks.rank == 0 and get_filesystem(path).exists(path) and may_be_replaced(path):
            self._remove(path)


def _writes_one_file(strategy: Strategy) -> bool:
    """Tell whether a strategy writes each checkpoint at once, as one file in Lightning's own way."""
    if not type(strategy).save_checkpoint.__module__.startswith("lightning."):
        return False
    if getattr(strategy, "_save_distributed_checkpoint", False):
        return False  # each process writes its shard
    try:
        return type(strategy.checkpoint_io) is TorchCheckpointIO
    except NotImplementedError:
        return False
