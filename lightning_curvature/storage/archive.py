"""Reading files of ``torch.save``: nothing is unpickled but tensors and primitives."""

import importlib
import os
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.storage.sniff import looks_like_safetensors, sniff
from lightning_curvature.storage.tree import COPY_AGAIN, is_text

_REFUSED = re.compile(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>")
"""Where the errors of torch name the class that a file needs."""
_HARMFUL = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|io|runpy|socket|pty)\..*|builtins\.(eval|exec|open|getattr|compile|__import__)"
)


def read_archive(path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> Any:
    """Load a file of ``torch.save`` with ``weights_only=True``; tensors stay on the disk until they are used.

    Args:
        path: File.
        allow_globals: Names of classes, such as ``"argparse.Namespace"``, that the file may hold, too. Allow what you
            know: an object of a class can do anything.

    Raises:
        OSError: If there is no such file, or it may not be read.
        ValueError: If the file needs another class, or is no such file.
    """
    allowed = [_class(name) for name in allow_globals]
    try:
        with torch.serialization.safe_globals(allowed):
            return _load(path)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle ends in errors of every kind
        if told := sniff(path):
            raise ValueError(f"{path}: not a file of torch.save, but {told[0]}. {told[1]}") from error
        match = _REFUSED.search(str(error))
        if match is None or not isinstance(error, pickle.UnpicklingError):
            raise _broken(path, error) from error
        raise _needs_classes(path, match[1] or match[2], allow_globals) from error


def _class(name: str) -> Any:
    """Return the class of a name that a user allowed."""
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"allow_globals: {name!r} is no full name of a class. Give it with its module, such as "
            "'argparse.Namespace' (--allow-global argparse.Namespace)."
        )
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"allow_globals: there is no class {name!r} ({error}).") from error


def _load(path: str | os.PathLike[str]) -> Any:
    # The format of torch before 1.6 is no archive, and cannot stay on the disk.
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("its entries are compressed, which torch.save does not do")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def _broken(path: str | os.PathLike[str], error: Exception) -> ValueError:
    """Return the error for a file that cannot be read, whatever classes it may hold."""
    # torch wraps its reason in advice to load the file unsafely, which would not help and is not given here.
    reason = str(error).partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
    reason = " ".join((reason or str(error)).split())[:300] or "it ends too early"
    remedy = "It is a safetensors file: name it NAME.safetensors." if looks_like_safetensors(path) else COPY_AGAIN
    return ValueError(f"{path}: not a file of torch.save, or a broken one ({type(error).__name__}: {reason}). {remedy}")


def _needs_classes(path: str | os.PathLike[str], first: str, allowed: Sequence[str]) -> ValueError:
    """Return the error for a file that needs classes that are not allowed; ``first`` is the first of them."""
    names = {first}
    with suppress(Exception):  # of a file that cannot be read to its end, the first one is named
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    needed = sorted(names - set(allowed))
    if harmful := [name for name in needed if _HARMFUL.fullmatch(name)]:
        return ValueError(
            f"{path} calls {', '.join(harmful)} when it is unpickled, which no checkpoint needs. Nothing was "
            "loaded. Do not trust this file."
        )
    return ValueError(
        f"{path} holds objects of {', '.join(needed)}, and unpickling them could run any code. Nothing was loaded. "
        f"If you trust the file, add --allow-global {' '.join(needed)} (allow_globals={needed!r})."
    )


def check_tensors(tensors: Mapping[Any, Any], path: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` if a value that was read from a file is no plain tensor, or one that the file cannot hold.

    A plain tensor is a dense one of numbers on the CPU, and its name is text.

    Args:
        tensors: What was read, by name.
        path: The file.
    """
    size = Path(path).stat().st_size
    for name, value in tensors.items():
        if not is_text(name):
            raise ValueError(f"{path}: a tensor has the name {name!a:.60}; expected text. Save it under another name.")
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.is_quantized or value.is_nested or value.is_conj() or value.is_neg():
            raise ValueError(
                f"{path}: {name!r} is no plain tensor, but {type(value).__name__} "
                f"{[getattr(value, key, '') for key in ('layout', 'device', 'dtype')]}. Save it as a dense one."
            )
        if value.nbytes > size:
            raise ValueError(
                f"{path}: {name!r} has {value.nbytes} bytes, more than the file. Is it expanded? Clone it."
            )
