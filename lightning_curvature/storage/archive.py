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

_BROKEN = "{}: not a file of torch.save, or a broken one ({}: {})."


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
        ValueError: If the file needs another class, or is no such file.
    """
    allowed = []
    for name in allow_globals:
        module, _, attribute = name.rpartition(".")
        if not module:
            raise ValueError(
                f"allow_globals: {name!r} is no full name of a class. Give it with its module, such as "
                "'argparse.Namespace' (--allow-global argparse.Namespace)."
            )
        try:
            allowed.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"allow_globals: there is no class {name!r} ({error}).") from error
    try:
        with torch.serialization.safe_globals(allowed):
            return _load(path)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle ends in errors of every kind
        if told := sniff(path):
            raise ValueError(f"{path}: not a file of torch.save, but {told[0]}. {told[1]}") from error
        found = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)'>", str(error))
        if found is None or not isinstance(error, pickle.UnpicklingError):
            # torch wraps its reason in advice to load the file unsafely, which would not help and is not given here.
            reason = str(error).partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
            reason = " ".join((reason or str(error)).split())[:300] or "it ends too early"
            remedy = (
                "It is a safetensors file: name it NAME.safetensors." if looks_like_safetensors(path) else COPY_AGAIN
            )
            raise ValueError(f"{_BROKEN.format(path, type(error).__name__, reason)} {remedy}") from error
        globals_ = {found[1] or found[2]}
        with suppress(Exception):  # of a file that cannot be read to its end, the first one is named
            globals_ |= set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        needed = sorted(globals_ - set(allow_globals))
        harmful = [name for name in needed if _HARMFUL.fullmatch(name)]
        if harmful:
            raise ValueError(
                f"{path} calls {', '.join(harmful)} when it is unpickled, which no checkpoint needs. Nothing was "
                "loaded. Do not trust this file."
            ) from error
        raise ValueError(
            f"{path} holds objects of {', '.join(needed)}, and unpickling them could run any code. Nothing was loaded. "
            f"If you trust the file, add --allow-global {' '.join(needed)} (allow_globals={needed!r})."
        ) from error


def check_tensors(tensors: Mapping[Any, Any], path: str | os.PathLike[str]) -> None:
    """Raise ``ValueError`` if one of the tensors of a file is not one of plain numbers that lie in it, with a name.

    Args:
        tensors: By name; what is no tensor is refused, too.
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


def _load(path: str | os.PathLike[str]) -> Any:
    # The format of torch before 1.6 is no archive, and cannot stay on the disk.
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise zipfile.BadZipFile("its entries are compressed, which torch.save does not do")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
