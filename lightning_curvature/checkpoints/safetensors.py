"""Safetensors files, copied as a stream of bytes in which single tensors are replaced.

A file is a header (eight bytes of length, JSON with dtype, shape and byte range of every tensor, and string metadata)
and the bytes of the tensors. An edited tensor has the size of the original, so a copy with other metadata and a few
other byte ranges is all that an edit needs: every other tensor stays byte-identical, whatever its dtype, and passes
through memory in chunks; one edited tensor is in memory at a time.
"""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_curvature.checkpoints.base import Checkpoint, Edits, check_same
from lightning_curvature.checkpoints.facts import METADATA_ENTRY, check_facts
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.hashes import as_bytes, tensor_hash
from lightning_curvature.storage.outputs import Format
from lightning_curvature.storage.sniff import sniff
from lightning_curvature.storage.tree import COPY_AGAIN, is_text, parse_json

_CHUNK = 2**22  # bytes
_METADATA = "__metadata__"
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}


class SafetensorsFile(Checkpoint):
    """A safetensors file that is read tensor by tensor.

    Args:
        path: File.

    Attributes:
        raw_header: The JSON header as it stands in the file.
        header: Dtype, shape and byte range of every tensor by name.
        metadata: The file's string metadata.
        start: Where the bytes of the tensors begin.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a complete safetensors file.
    """

    format: ClassVar[Format] = "safetensors"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with safe_open(self.path, framework="pt"):
                pass  # the library checks the header, the byte ranges and the file's length
        except SafetensorError as error:
            if told := sniff(path):
                raise ValueError(f"{path}: not a complete safetensors file, but {told[0]}. {told[1]}") from error
            remedy = "It is one of torch.save: name it NAME.pt." if zipfile.is_zipfile(path) else COPY_AGAIN
            raise ValueError(f"{path}: not a complete safetensors file ({error}). {remedy}") from error
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.raw_header = file.read(length)
        self.header = parse_json(self.raw_header, f"{path}: its header")
        self.metadata: dict[str, str] = self.header.pop(_METADATA, None) or {}
        self.start = 8 + length

    @property
    def edit_facts(self) -> dict[str, Any] | None:
        """What an earlier edit wrote about itself, or None."""
        if METADATA_ENTRY not in self.metadata:
            return None
        return _read_facts(self.metadata[METADATA_ENTRY], f"{self.path}")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor."""
        return {name: tuple(entry["shape"]) for name, entry in self.header.items()}

    def num_bytes(self, name: str) -> int:
        """Return the bytes of a tensor."""
        begin, end = self.header[name]["data_offsets"]
        return int(end) - int(begin)

    def hash(self, name: str) -> str:
        """Return the hash of a tensor, which passes through memory in chunks."""
        entry = self.header[name]
        if entry["dtype"] not in _DTYPES:
            return tensor_hash(self.read(name))
        digest, left = hashlib.sha256(), self.num_bytes(name)
        with self.path.open("rb") as file:
            file.seek(self.start + int(entry["data_offsets"][0]))
            while left and (chunk := file.read(min(left, _CHUNK))):
                digest.update(chunk)
                left -= len(chunk)
        return f"torch.{_DTYPES[entry['dtype']]} {entry['shape']} {digest.hexdigest()}"

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        return self._mapped(name).clone()

    def _mapped(self, name: str) -> Tensor:
        """Return a tensor, which stays on the disk until its entries are used."""
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
        except (SafetensorError, AttributeError) as error:  # of a dtype that this torch does not have
            raise ValueError(f"{self.path}: {name!r} cannot be read ({error}). Save it with another dtype.") from error

    def headers(self) -> dict[str, str]:
        """Return the header as it stands in the file, which a copy needs to be byte-identical to the original."""
        return {"": self.raw_header.decode()}

    def copy(
        self,
        target: str | os.PathLike[str],
        edits: Edits,
        facts: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Write a copy with some tensors replaced, as the base class says.

        The facts are an entry of the metadata. A recorded header is written as it is, if it describes the same
        tensors at the same places.
        """
        metadata = {key: value for key, value in self.metadata.items() if key != METADATA_ENTRY}
        if facts is not None:
            metadata[METADATA_ENTRY] = json.dumps(facts)
        content = {_METADATA: metadata, **self.header} if metadata else self.header
        header = _packed(content)
        recorded = (headers or {}).get("")
        if recorded is not None and {k: v for k, v in json.loads(recorded).items() if k != _METADATA} == self.header:
            header = recorded.encode()

        with (
            replacing(target, like=self.path) as temporary,
            temporary.open("r+b") as out,
            self.path.open("rb") as source,
        ):
            _write_header(out, header)
            source.seek(self.start)
            shutil.copyfileobj(source, out, _CHUNK)
            for name, edit in edits.items():
                new = edit()
                check_same(name, self._mapped(name), new)
                out.seek(8 + len(header) + int(self.header[name]["data_offsets"][0]))
                out.write(as_bytes(new))
            out.flush()


def join_files(parts: Mapping[str, Path], target: Path, metadata: Mapping[str, str]) -> None:
    """Write one file of the tensors of several, each of which holds one; they pass through memory in chunks.

    Args:
        parts: Files by the name that their tensor gets.
        target: File to write.
        metadata: Its metadata.
    """
    files, header, offset = {name: SafetensorsFile(path) for name, path in parts.items()}, dict[str, Any](), 0
    for name, file in files.items():
        ((name_there, entry),) = file.header.items()
        end = offset + file.num_bytes(name_there)
        header[name] = {**entry, "data_offsets": [offset, end]}
        offset = end
    with target.open("wb") as out:
        _write_header(out, _packed({_METADATA: dict(metadata), **header}))
        for file in files.values():
            with file.path.open("rb") as source:
                source.seek(file.start)
                shutil.copyfileobj(source, out, _CHUNK)


def _packed(header: Mapping[str, Any]) -> bytes:
    """Return a header as JSON, filled up so that the tensors begin at a multiple of eight bytes."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _write_header(out: BinaryIO, header: bytes) -> None:
    out.write(len(header).to_bytes(8, "little") + header)


def check_header(text: str, what: str) -> None:
    """Raise ``ValueError`` if a text is no header of a safetensors file: JSON with strings as metadata."""
    metadata = parse_json(text, what).get(_METADATA) or {}
    if not isinstance(metadata, dict) or not all(map(is_text, (text, *metadata, *metadata.values()))):
        raise ValueError(f"{what} has metadata that are no strings. {COPY_AGAIN}")
    if METADATA_ENTRY in metadata:
        _read_facts(metadata[METADATA_ENTRY], what)


def _read_facts(text: str, what: str) -> dict[str, Any]:
    """Return what the metadata of the file ``what`` say about its edit."""
    what = f"{what}: the metadata entry {METADATA_ENTRY!r}"
    return check_facts(parse_json(text, what), what)
