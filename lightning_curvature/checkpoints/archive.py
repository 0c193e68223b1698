"""Files of ``torch.save``: Lightning checkpoints and state dicts. Nothing is unpickled but tensors and primitives."""

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_curvature.checkpoints.base import Checkpoint, Edits, check_same
from lightning_curvature.checkpoints.facts import ENTRY, check_facts
from lightning_curvature.storage.archive import check_tensors, read_archive
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.hashes import tensor_hash
from lightning_curvature.storage.outputs import Format

_NESTED = ("state_dict", "model_state_dict", "model", "module")
_ATTRIBUTE = "_lightning_curvature"  # of a state dict, whose entries must all be weights


class ArchiveFile(Checkpoint):
    """A Lightning checkpoint or a state dict in a file of ``torch.save``.

    Args:
        path: File.
        allow_globals: As in :func:`read_archive`.

    Attributes:
        content: All that the file holds; tensors stay on the disk until they are used.
        nested: The entry of the content that is the state dict; None if the content is the state dict itself.
        state_dict: The weights, and what else a module puts into its state.

    Raises:
        ValueError: If the file holds neither.
    """

    format: ClassVar[Format] = "archive"

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

    @property
    def edit_facts(self) -> dict[str, Any] | None:
        """What an earlier edit wrote about itself, or None."""
        facts = self.content.get(ENTRY) if self.nested is not None else getattr(self.state_dict, _ATTRIBUTE, None)
        return check_facts(facts, f"{self.path}: the entry {ENTRY!r}") if isinstance(facts, dict) else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(value.shape) for name, value in self.state_dict.items() if isinstance(value, Tensor)}

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        return int(self.state_dict[name].nbytes)

    def hash(self, name: str) -> str:
        """Return the hash of a tensor."""
        return tensor_hash(self.state_dict[name])

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        tensor: Tensor = self.state_dict[name].detach().clone()
        return tensor

    def headers(self) -> dict[str, str]:
        """Return nothing: an archive has no header of its own."""
        return {}

    @override
    def copy(
        self,
        target: str | os.PathLike[str],
        edits: Edits,
        facts: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write a copy with some tensors replaced, as the base class says; a name tied to one of them gets it, too."""
        state_dict = self._edited(edits)
        if self.nested is not None:
            content = {**self.content, self.nested: state_dict, ENTRY: facts}
            if facts is None:
                del content[ENTRY]
        else:
            content = state_dict
            vars(content)[_ATTRIBUTE] = facts
            if facts is None:
                del vars(content)[_ATTRIBUTE]
        with replacing(target, like=self.path) as temporary:
            torch.save(content, temporary)

    @override
    def tied_to(self, name: str) -> set[str]:
        edited = self.state_dict[name]
        return {
            tied
            for tied, tensor in self.state_dict.items()
            if tied == name or (isinstance(tensor, Tensor) and _same_view(edited, tensor))
        }

    def check_ties(self, names: Iterable[str]) -> None:
        """Raise ``ValueError`` if one of the tensors to edit is tied to others in a way that an edit cannot keep."""
        names = set(names)
        for name in sorted(names):
            edited = self.state_dict[name]
            for tied, tensor in self.state_dict.items():
                if tied == name or not isinstance(tensor, Tensor) or not _overlap(edited, tensor):
                    continue
                if tied in names or not _same_view(edited, tensor):
                    how = "is the same tensor" if tied in names else "shares a part of its memory"
                    raise ValueError(
                        f"{name!r} cannot be edited: {tied!r} {how} (tied weights). Leave one of them out of layers=."
                    )

    def _edited(self, edits: Edits) -> "OrderedDict[str, Any]":
        """Return the state dict with new tensors, also under the names that are tied to the edited ones."""
        self.check_ties(edits)
        state_dict = OrderedDict(self.state_dict)
        vars(state_dict).update(getattr(self.state_dict, "__dict__", {}))  # such as the _metadata of torch
        for name, edit in edits.items():
            old, new = self.state_dict[name], edit()
            check_same(name, old, new)
            for tied, tensor in self.state_dict.items():
                if isinstance(tensor, Tensor) and _same_view(tensor, old):
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    state_dict[tied] = torch.nn.Parameter(new, old.requires_grad) if is_parameter else new
        return state_dict


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Tell whether the memory of two tensors overlaps."""
    (begin, end), (second_begin, second_end) = (_addresses(tensor) for tensor in (first, second))
    return max(begin, second_begin) < min(end, second_end)


def _addresses(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte of a tensor, and that behind the last one."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * step for size, step in steps) if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * length


def _same_view(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors are the same entries of the same memory."""
    return (first.data_ptr(), first.shape, first.stride()) == (second.data_ptr(), second.shape, second.stride())
