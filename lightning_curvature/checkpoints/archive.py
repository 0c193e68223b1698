"""Files of ``torch.save``: Lightning checkpoints and state dicts. Nothing is unpickled but tensors and primitives."""

import importlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_curvature._checks import listing
from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.checkpoints.outputs import Format
from lightning_curvature.checkpoints.safetensors import Edits, check_same, looks_like_safetensors, tensor_hash
from lightning_curvature.checkpoints.sniff import sniff
from lightning_curvature.checkpoints.tree import COPY_AGAIN, check_facts, is_text

KEY = "lightning_curvature"
"""Entry of a Lightning checkpoint that says what was edited."""
_BROKEN = "{}: not a file of torch.save, or a broken one ({}: {})."
_HARMFUL = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|io|runpy|socket|pty)\..*|builtins\.(eval|exec|open|getattr|compile|__import__)"
)
_NESTED = ("state_dict", "model_state_dict", "model", "module")
_ATTRIBUTE = "_lightning_curvature"  # of a state dict, whose entries must all be weights


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


def edited_note(checkpoint: Mapping[str, Any]) -> str | None:
    """Return a sentence that says what was edited in the content of a Lightning checkpoint; None if nothing was.

    Args:
        checkpoint: What ``torch.load`` returns of it, or a hook of Lightning is given.
    """
    found = checkpoint.get(KEY)
    if not isinstance(found, dict):
        return None
    layers = found.get("layers") if isinstance(found.get("layers"), dict) else {}
    return (
        f"This checkpoint is an edited copy (method {found.get('method')}, layers {listing(layers or {}, 3)}): its "
        "weights are not those that training left, while the states of its optimizers are. Go on from the checkpoint "
        "beside it whose name lacks the mark, such as NAME.ckpt of NAME-edited.ckpt, unless you mean the edited one."
    )


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


class ArchiveFile:
    """A Lightning checkpoint or a state dict in a file of ``torch.save``.

    Args:
        path: File.
        allow_globals: As in :func:`read_archive`.

    Raises:
        ValueError: If the file holds neither.
    """

    def __init__(self, path: str | os.PathLike[str], allow_globals: Sequence[str] = ()) -> None:
        self.path = Path(path)
        self.content = read_archive(path, allow_globals)
        content = self.content if isinstance(self.content, dict) else {}
        self.nested = next((key for key in _NESTED if isinstance(content.get(key), dict)), None)
        self.state_dict: dict[str, Any] = self.content if self.nested is None else self.content[self.nested]
        if not isinstance(self.state_dict, dict) or not any(isinstance(v, Tensor) for v in self.state_dict.values()):
            raise ValueError(
                f"{path} holds a {type(self.content).__name__}; expected a state dict, or a checkpoint with one under "
                f"{', '.join(map(repr, _NESTED))}."
            )
        check_tensors({name: value for name, value in self.state_dict.items() if isinstance(value, Tensor)}, path)

    format: Format = "archive"

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What an earlier edit wrote, or None."""
        found = self.content.get(KEY) if self.nested is not None else getattr(self.state_dict, _ATTRIBUTE, None)
        return check_facts(found, f"{self.path}: the entry {KEY!r}") if isinstance(found, dict) else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(value.shape) for name, value in self.state_dict.items() if isinstance(value, Tensor)}

    def module_names(self) -> dict[str, str]:
        """Return nothing: no library renames these tensors when it loads them."""
        return {}

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return int(self.state_dict[name].nbytes)

    def hash(self, name: str) -> str:
        """Return what :func:`lightning_curvature.checkpoints.safetensors.tensor_hash` does of one tensor."""
        return tensor_hash(self.state_dict[name])

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
        tensor: Tensor = self.state_dict[name].detach().clone()
        return tensor

    def headers(self) -> dict[str, str]:
        """Return nothing: an archive has no header of its own."""
        return {}

    def copy(
        self,
        target: str | os.PathLike[str],
        edits: Edits,
        provenance: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,  # noqa: ARG002
    ) -> None:
        """Write a copy with some tensors replaced, atomically; tensors that share memory with one of them follow it."""
        state_dict = self._edited(edits)
        if self.nested is not None:
            content = {**self.content, self.nested: state_dict, KEY: provenance}
            if provenance is None:
                del content[KEY]
        else:
            content = state_dict
            vars(content)[_ATTRIBUTE] = provenance
            if provenance is None:
                del vars(content)[_ATTRIBUTE]
        with replacing(target, like=self.path) as temporary:
            torch.save(content, temporary)

    def check_ties(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` if one of the tensors to edit is tied to others in a way that an edit cannot keep."""
        names = set(names)
        for name in sorted(names):
            own = self.state_dict[name]
            for other, tensor in self.state_dict.items():
                if other == name or not isinstance(tensor, Tensor) or not _overlap(own, tensor):
                    continue
                if other in names or not _same_view(own, tensor):
                    how = "is the same tensor" if other in names else "shares a part of its memory"
                    raise ValueError(
                        f"{name!r} cannot be edited: {other!r} {how} (tied weights). Leave one of them out of layers=."
                    )

    def _edited(self, edits: Edits) -> "OrderedDict[str, Any]":
        """Return the state dict with new tensors."""
        self.check_ties(edits)
        state_dict = OrderedDict(self.state_dict)
        vars(state_dict).update(getattr(self.state_dict, "__dict__", {}))
        for name, edit in edits.items():
            old, new = self.state_dict[name], edit()
            check_same(name, old, new)
            for other, tensor in self.state_dict.items():
                if isinstance(tensor, Tensor) and _same_view(tensor, old):
                    state_dict[other] = torch.nn.Parameter(new, old.requires_grad) if _is_parameter(tensor) else new
        return state_dict


def _overlap(one: Tensor, two: Tensor) -> bool:
    """Tell whether two tensors share memory."""
    (start, end), (begin, stop) = ((t.data_ptr(), t.data_ptr() + t.element_size() * _extent(t)) for t in (one, two))
    return max(start, begin) < min(end, stop)


def _extent(tensor: Tensor) -> int:
    return (
        1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    )


def _same_view(one: Tensor, two: Tensor) -> bool:
    return one.data_ptr() == two.data_ptr() and one.shape == two.shape and one.stride() == two.stride()


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)
