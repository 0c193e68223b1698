"""Files of ``torch.save``: Lightning checkpoints and state dicts. Nothing is unpickled but tensors and primitives."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.checkpoints.base import Edits, check_same
from lightning_curvature.checkpoints.facts import ENTRY, check_facts
from lightning_curvature.storage.archive import check_tensors, read_archive
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.hashes import tensor_hash
from lightning_curvature.storage.outputs import Format

_NESTED = ("state_dict", "model_state_dict", "model", "module")
_ATTRIBUTE = "_lightning_curvature"  # of a state dict, whose entries must all be weights


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
        found = self.content.get(ENTRY) if self.nested is not None else getattr(self.state_dict, _ATTRIBUTE, None)
        return check_facts(found, f"{self.path}: the entry {ENTRY!r}") if isinstance(found, dict) else None

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
        """Return what :func:`lightning_curvature.storage.hashes.tensor_hash` does of one tensor."""
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
            content = {**self.content, self.nested: state_dict, ENTRY: provenance}
            if provenance is None:
                del content[ENTRY]
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
