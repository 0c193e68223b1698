"""New tensors of a checkpoint, kept on the disk until they are written."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import Self


class Scratch:
    """A folder for tensors that wait on the disk until the target is written: one at a time is in memory.

    Args:
        target: File or folder that will be written. The scratch folder lies beside it.
    """

    def __init__(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._folder = tempfile.TemporaryDirectory(prefix=".edit.", dir=target.parent)
        self.path = Path(self._folder.name)
        self._count = 0

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Write a tensor to the folder; return a function that reads it, which maps it until its entries are used."""
        path = self.path / f"{self._count}.safetensors"
        self._count += 1
        save_file({"tensor": tensor.detach().cpu().contiguous()}, path)
        return lambda: load_file(path)["tensor"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the folder."""
        self._folder.cleanup()
