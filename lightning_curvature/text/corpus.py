"""Text files as token windows, read as a stream."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_curvature._checks import check_count
from lightning_curvature.storage.jsonl import check_file, read_jsonl
from lightning_curvature.storage.outputs import ending
from lightning_curvature.storage.tree import is_text
from lightning_curvature.text.leading import encode, leading_tokens

_CHUNK = 200_000
"""Characters of a plain text file that are tokenized at once, cut at the end of a line."""


def read_documents(path: str | os.PathLike[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield the token ids of the documents of a file, without the tokens in front of a text.

    Args:
        path: A ``.jsonl`` file: each line is a document, its field ``text``, and is closed by the tokenizer's
            end-of-text token. Any other file is one document of plain UTF-8 text, in chunks that end with a line.
        tokenizer: A transformers tokenizer.

    Raises:
        ValueError: If the file is empty, not UTF-8, a file of JSON with another ending, or a line of it lacks ``text``.
    """
    check_file(path, "text, or JSON lines (*.jsonl) with a field 'text'")
    if ending(path) in (".json", ".ndjson"):
        raise ValueError(
            f"{path}: text in JSON is read line by line, an object with a field 'text' in each, from a file *.jsonl. "
            "If it holds such lines, name it so; if not, write them."
        )
    if ending(path) == ".jsonl":
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for number, record in read_jsonl(path, ("text",)):
            if not is_text(record["text"]):
                raise ValueError(f"{path}, line {number}: text must be a string, found {record['text']!r:.60}.")
            yield encode(tokenizer, record["text"]) + end
        return
    empty = True
    with Path(path).open(encoding="utf-8-sig") as file:
        try:
            while lines := file.readlines(_CHUNK):
                empty = False
                yield encode(tokenizer, "".join(lines))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}). Save the text in that encoding.") from error
    if empty:
        raise ValueError(f"{path}: the file is empty; expected text, or JSON lines (*.jsonl) with a field 'text'.")


def token_windows(
    path: str | os.PathLike[str], tokenizer: Any, length: int, limit: int | None = None
) -> Iterator[list[int]]:
    """Yield windows of ``length`` tokens. Documents are packed; an incomplete last window is dropped.

    Each window begins with the tokens that the tokenizer puts in front, see :mod:`lightning_curvature.text.leading`.

    Args:
        path: File, see :func:`read_documents`.
        tokenizer: A transformers tokenizer.
        length: Tokens of a window, the tokens in front among them.
        limit: Tokens to yield at most, the tokens in front among them.

    Raises:
        ValueError: If the text or ``limit`` is shorter than one window, or a window has no room for text.
    """
    leading = list(leading_tokens(tokenizer))
    num_text = check_count(length, "length") - len(leading)
    if num_text < 1:
        raise ValueError(
            f"A window of {length} tokens has no room for text: this tokenizer puts {len(leading)} in front of it. Use "
            "a longer window."
        )
    if limit is not None and limit < length:
        raise ValueError(f"A limit of {limit} tokens is shorter than one window of {length}.")
    window: list[int] = []
    count = 0
    for ids in read_documents(path, tokenizer):
        window += ids
        while len(window) >= num_text:
            if limit is not None and (count + 1) * length > limit:
                return
            yield leading + window[:num_text]
            window = window[num_text:]
            count += 1
    if not count:
        front = f", {len(leading)} of them in front of the text" if leading else ""
        raise ValueError(
            f"{path}: {len(window)} tokens are less than one window of {length}{front}. Use a shorter window."
        )
