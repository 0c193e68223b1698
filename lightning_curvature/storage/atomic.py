"""Writes that leave the old file or the new one, and never a part."""

import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str], like: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; on success it is synced and renamed onto the target.

    If the body raises, the temporary file is removed and the target is as it was. The target gets the permissions of
    the file ``like``, or the usual ones.

    >>> target = Path(tempfile.mkdtemp(), "note.txt")
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("done")
    >>> target.read_text()
    'done'
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask if like is None else like.stat().st_mode & 0o777)  # mkstemp makes private files
        temporary.replace(target)
        sync(target.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(new: Path, target: Path) -> None:
    """Put a new folder in the place of an old one, on the same file system.

    Where the system can exchange two names in one step (Linux), there is always a complete folder at ``target``, and
    the old folder is left at ``new``. Elsewhere the old folder is moved away first. It is put back if the new one
    cannot take its place.
    """
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = new.with_suffix(".old")
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
    sync(target.parent)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path of a folder to make beside the target; on success it is synced and put in the target's place.

    If the body raises, what it made is removed, and the target is as it was.

    >>> target = Path(tempfile.mkdtemp(), "notes")
    >>> with replacing_folder(target) as new:
    ...     new.mkdir()
    ...     _ = (new / "note.txt").write_text("done")
    >>> [path.name for path in target.iterdir()]
    ['note.txt']
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    new = scratch / "new"
    try:
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                sync(file)
        replace_folder(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        with suppress(OSError):
            scratch.rmdir()  # an old folder that could not be put back stays in it
        raise
    shutil.rmtree(scratch, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; tell whether the system could."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0
