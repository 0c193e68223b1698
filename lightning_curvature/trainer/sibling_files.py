"""Files beside a checkpoint: how they are named, and how they are written and removed, on any file system."""

import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.utilities import rank_zero_warn

from lightning_curvature.checkpoints.facts import ENTRY


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


def apart(path: str) -> str:
    """Return the path by which the siblings of a checkpoint are named.

    Lightning finds the latest checkpoint of a preempted job by the digits in the names of all files with "ckpt_" in
    them: those of its siblings must not be among them.

    >>> apart("runs/hpc_ckpt_3.ckpt"), apart("runs/last.ckpt")
    ('runs/hpc-ckpt-3.ckpt', 'runs/last.ckpt')
    """
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.replace('hpc_ckpt_', 'hpc-ckpt-')}"


def may_be_replaced(path: str) -> bool:
    """Tell whether what is at the path of an edited copy is one: other people's files stay."""
    if not is_local(path) or not Path(path).is_file():
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return ENTRY.encode() in archive.read(pickled)
    except (zipfile.BadZipFile, ValueError):
        return False


def absolute(path: str) -> str:
    """Return a local path as one that is right in any working directory; others as they are."""
    return str(Path(path).absolute()) if is_local(path) else path


def is_local(path: str) -> bool:
    """Tell whether a path is one of the local file system."""
    return isinstance(get_filesystem(path), LocalFileSystem)


def stamp_of(path: str) -> tuple[int, int]:
    """Return size and time of a local file, which tell whether it was written again."""
    status = Path(path).stat()
    return status.st_size, status.st_mtime_ns


def write_file(writer: Callable[[Path], None] | None, path: str) -> None:
    """Write a file on any file system; remove it where there is no writer."""
    files = get_filesystem(path)
    if writer is None:
        delete(path)
    elif isinstance(files, LocalFileSystem):
        writer(Path(path))
    else:
        with tempfile.TemporaryDirectory() as folder:
            writer(local := Path(folder, "factors.safetensors"))
            files.put_file(local, path)


def delete(path: str) -> None:
    """Remove a file, if it is there."""
    if get_filesystem(path).exists(path):
        get_filesystem(path).rm(path)


@contextmanager
def costs_a_warning(path: str) -> Iterator[None]:
    """Make a warning of an error: a checkpoint is saved, and training goes on, whatever becomes of its siblings."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  # whatever it is, the checkpoint matters more
        rank_zero_warn(
            f"A sibling of {path} could not be written ({type(error).__name__}: {error}); the checkpoint itself is not "
            "affected."
        )
