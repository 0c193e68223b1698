"""Text files as token windows, read as a stream."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_curvature._checks import check_count
from lightning_curvature.checkpoints.tree import is_text
from lightning_curvature.text.jsonl import read_jsonl

_CHUNK = 200_000
"""Characters of a plain text file that are tokenized at once, cut at the end of a line."""


def read_documents(path: str | os.PathLike[str], tokenizer: Any) -> Iterator[list[int]]:
    """Yield token ids, document by document.

    Args:
        path: A ``.jsonl`` file with a field ``text`` in each line (one document each, closed by the tokenizer's
            end-of-text token), or any other file as plain UTF-8 text (one document, in chunks that end with a line).
        tokenizer: A transformers tokenizer.

    Raises:
        ValueError: If the file is empty, or a line of JSON lacks ``text``.
    """
    if Path(path).suffix == ".jsonl":
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for number, record in read_jsonl(path, ("text",)):
            if not is_text(record["text"]):
                raise ValueError(f"{path}, line {number}: text must be a string, found {record['text']!r:.60}.")
            yield _encode(tokenizer, record["text"]) + end
        return
    empty = True
    with Path(path).open(encoding="utf-8") as file:
        try:
            while lines := file.readlines(_CHUNK):
                empty = False
                yield _encode(tokenizer, "".join(lines))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error}). Save the text in that encoding.") from error
    if empty:
        raise ValueError(f"{path}: the file is empty; expected text, or JSON lines (*.jsonl) with a field 'text'.")


def token_windows(
    path: str | os.PathLike[str], tokenizer: Any, length: int, limit: int | None = None
) -> Iterator[list[int]]:
    """Yield windows of ``length`` tokens, one after the other; documents are packed, an incomplete last window dropped.

    Args:
        path: File, see :func:`read_documents`.
        tokenizer: A transformers tokenizer.
        length: Tokens per window.
        limit: Tokens to yield at most.

    Raises:
        ValueError: If the text is shorter than one window, or ``limit`` is.
    """
    check_count(length, "length")
    if limit is not None and limit < length:
        raise ValueError(f"A limit of {limit} tokens is shorter than one window of {length}.")
    window: list[int] = []
    count = 0
    for ids in read_documents(path, tokenizer):
        window += ids
        while len(window) >= length:
            if limit is not None and (count + 1) * length > limit:
                return
            yield window[:length]
            window = window[length:]
            count += 1
    if not count:
        raise ValueError(f"{path}: {len(window)} tokens are less than one window of {length}. Use a shorter window.")


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
