"""Safetensors files, copied as a stream of bytes in which single tensors are replaced.

A file is a header (eight bytes of length, JSON with dtype, shape and byte range of every tensor, and string metadata)
and the bytes of the tensors. An edited tensor has the size of the original, so a copy with other metadata and a few
other byte ranges is all that an edit needs: every other tensor stays byte-identical, whatever its dtype, and one tensor
is in memory at a time.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.checkpoints.tree import COPY_AGAIN, check_facts, is_text, parse_json

_CHUNK = 2**24
_METADATA = "__metadata__"
KEY = "lightning_curvature.edit"
"""Metadata entry that says what was edited, as JSON."""

Edits = Mapping[str, Callable[[Tensor], Tensor]]
"""By tensor name, a function from the original to the new tensor."""


class SafetensorsFile:
    """A safetensors file that is read tensor by tensor.

    Args:
        path: File.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete safetensors file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt"):
                pass  # the library checks the header, the byte ranges and the file's length
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error}). {COPY_AGAIN}") from error
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.raw_header = file.read(length)
        header = parse_json(self.raw_header, f"{path}: its header")
        self.metadata: dict[str, str] = header.pop(_METADATA, None) or {}
        self.header = header
        self.start = 8 + length

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(entry["shape"]) for name, entry in self.header.items()}

    def module_names(self) -> dict[str, str]:
        """Return nothing: no library renames these tensors when it loads them."""
        return {}

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        begin, end = self.header[name]["data_offsets"]
        return int(end) - int(begin)

    def read(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name).clone()
                return tensor
        except (SafetensorError, AttributeError) as error:  # of a dtype that this torch does not have
            raise ValueError(f"{self.path}: {name!r} cannot be read ({error}). Save it with another dtype.") from error

    @property
    def provenance(self) -> dict[str, Any] | None:
        """What an earlier edit wrote, or None."""
        if KEY not in self.metadata:
            return None
        return _read_facts(self.metadata[KEY], f"{self.path}")

    def headers(self) -> dict[str, str]:
        """Return the header as it stands in the file, which a copy needs to be byte-identical to the original."""
        return {"": self.raw_header.decode()}

    def copy(
        self,
        target: str | os.PathLike[str],
        edits: Edits,
        provenance: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write a copy with some tensors replaced, atomically.

        Args:
            target: File to write.
            edits: New tensors, of the shape and dtype of the old ones.
            provenance: What to write into the metadata; None takes such an entry out.
            headers: What :meth:`headers` of the original returned: the header to write as it is, if it describes the
                same tensors at the same places.
        """
        metadata = {key: value for key, value in self.metadata.items() if key != KEY}
        if provenance is not None:
            metadata[KEY] = json.dumps(provenance)
        content = {_METADATA: metadata, **self.header} if metadata else self.header
        header = json.dumps(content, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        recorded = (headers or {}).get("")
        if recorded is not None and {k: v for k, v in json.loads(recorded).items() if k != _METADATA} == self.header:
            header = recorded.encode()

        def copy_all(out: BinaryIO) -> None:
            out.write(len(header).to_bytes(8, "little") + header)
            with self.path.open("rb") as source:
                source.seek(self.start)
                shutil.copyfileobj(source, out, _CHUNK)

        with (
            replacing(target, like=self.path) as temporary,
            temporary.open("r+b") as out,
            ThreadPoolExecutor(1) as thread,  # the disk is busy while the first edit is computed
        ):
            copied = thread.submit(copy_all, out)
            for name, edit in edits.items():
                old = self.read(name)
                new = edit(old)
                check_same(name, old, new)
                copied.result()
                out.seek(8 + len(header) + int(self.header[name]["data_offsets"][0]))
                out.write(as_bytes(new))
            copied.result()
            out.flush()


def check_header(text: str, what: str) -> None:
    """Raise ``ValueError`` if a text is no header of a safetensors file: JSON with strings as metadata."""
    metadata = parse_json(text, what).get(_METADATA) or {}
    if not isinstance(metadata, dict) or not all(map(is_text, (text, *metadata, *metadata.values()))):
        raise ValueError(f"{what} has metadata that are no strings. {COPY_AGAIN}")
    if KEY in metadata:
        _read_facts(metadata[KEY], what)


def _read_facts(text: str, what: str) -> dict[str, Any]:
    what = f"{what}: the metadata entry {KEY!r}"
    return check_facts(parse_json(text, what), what)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, little-endian and row-major, as safetensors stores them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def check_same(name: str, old: Tensor, new: Tensor) -> None:
    """Raise ``ValueError`` if an edited tensor does not have the shape and dtype of the original."""
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"Tensor {name!r} is {old.dtype} {list(old.shape)}, the new one {new.dtype} {list(new.shape)}."
        )
