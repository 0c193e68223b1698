"""JSON lines, read with errors that name the line."""

import json
import os
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.outputs import ending

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4", ".7z", ".tgz", ".parquet")


def read_jsonl(path: str | os.PathLike[str], required: Iterable[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number and the object of each line; empty lines are passed over.

    Args:
        path: A file with one JSON object a line, UTF-8.
        required: Fields that every object must have.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object in UTF-8 or lacks a field; names file and line. If the file holds no
            object.
    """
    check_file(path, "JSON lines")
    required = list(required)
    is_empty = True
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not JSON in UTF-8 ({error}). Write it again.") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(record).__name__}.")
            missing = [field for field in required if field not in record]
            if missing:
                raise ValueError(f"{path}, line {number}: lacks {missing}; it has {sorted(record)}.")
            is_empty = False
            yield number, record
    if is_empty:
        raise ValueError(f"{path}: the file is empty; expected one JSON object per line.")


def check_file(path: str | os.PathLike[str], expected: str) -> None:
    """Raise ``OSError`` if there is no file at a path, ``ValueError`` if it is compressed; says what was expected."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a file, {expected}.")
    if not Path(path).is_file():
        raise FileNotFoundError(f"No such file: {path}; expected {expected}.")
    if ending(path) in _COMPRESSED:
        raise ValueError(f"{path} is compressed; expected {expected}. Unpack it first.")


def write_jsonl(path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, atomically."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
