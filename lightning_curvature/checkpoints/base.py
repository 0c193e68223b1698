"""What a checkpoint of every format offers: its tensors by name, what was edited in it, and edited copies of it."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from lightning_curvature.storage.outputs import Format

Edits = Mapping[str, Callable[[], Tensor]]
"""By tensor name, a function that returns the new tensor."""

_READERS = 8


class Checkpoint(ABC):
    """Saved weights on the disk, of one of three formats; :func:`~.opening.open_checkpoint` tells which.

    Opening a checkpoint checks it, and reads headers alone. Tensors are read one by one, when they are asked for.

    Attributes:
        path: File or folder.
        format: What it is.
    """

    path: Path
    format: ClassVar[Format]

    @property
    @abstractmethod
    def edit_facts(self) -> dict[str, Any] | None:
        """What an earlier edit wrote about itself, JSON values; None if the checkpoint was not edited.

        Raises:
            ValueError: If it is damaged.
        """

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""

    def module_names(self) -> dict[str, str]:
        """Return the tensor of each weight by the name that a library loads it under; nothing if no library does."""
        return {}

    @abstractmethod
    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""

    @abstractmethod
    def hash(self, name: str) -> str:
        """Return what :func:`~lightning_curvature.storage.hashes.tensor_hash` returns for a tensor."""

    def hashes(self) -> dict[str, str]:
        """Return the hash of every tensor. Several are read at a time."""
        names = sorted(self.shapes())
        with ThreadPoolExecutor(min(os.cpu_count() or 1, _READERS)) as threads:  # hashing lets other threads run
            return dict(zip(names, threads.map(self.hash, names), strict=True))

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor, on the CPU.

        Raises:
            ValueError: If it has a dtype that this torch does not have.
        """

    @abstractmethod
    def headers(self) -> dict[str, str]:
        """Return, by file, the text that an edit changes beside the tensors, so that a copy can get it back."""

    @abstractmethod
    def copy(
        self,
        target: str | os.PathLike[str],
        edits: Edits,
        facts: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write a copy with some tensors replaced, atomically: the target appears as a whole, or not at all.

        Everything else is copied as it is.

        Args:
            target: File or folder to write. What is there is replaced.
            edits: New tensors, of the shape and dtype of the old ones. One at a time is in memory.
            facts: What the copy says about the edit; None if it shall not say that it was edited.
            headers: What :meth:`headers` of the original returned, for a copy that is the original again. Headers of
                another format, or of other tensors, are passed over.

        Raises:
            ValueError: If a new tensor has another shape or dtype than the old one, or is tied to others.
        """

    def tied_to(self, name: str) -> set[str]:
        """Return the names under which the checkpoint holds one tensor, the name that is given among them."""
        return {name}

    def check_ties(self, names: Iterable[str]) -> None:  # noqa: B027 - two formats hold no tied tensors
        """Raise ``ValueError`` if one of the tensors to edit is tied to others in a way that an edit cannot keep."""


def check_same(name: str, old: Tensor, new: Tensor) -> None:
    """Raise ``ValueError`` if an edited tensor does not have the shape and dtype of the original."""
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"Tensor {name!r} is {old.dtype} {list(old.shape)}, the new one {new.dtype} {list(new.shape)}."
        )
