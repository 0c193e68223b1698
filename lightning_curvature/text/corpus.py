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
    """Yield the token ids of a text alone, document by document.

    Args:
        path: A ``.jsonl`` file with a field ``text`` in each line (one document each, closed by the tokenizer's
            end-of-text token), or any other file as plain UTF-8 text (one document, in chunks that end with a line).
        tokenizer: A transformers tokenizer.

    Raises:
        ValueError: If the file is empty, or a line of JSON lacks ``text``.
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
    """Yield windows of ``length`` tokens, one after the other; documents are packed, an incomplete last window dropped.

    Each begins with the tokens that the tokenizer puts in front, see :mod:`lightning_curvature.text.leading`.

    Args:
        path: File, see :func:`read_documents`.
        tokenizer: A transformers tokenizer.
        length: Tokens per window, those in front among them.
        limit: Tokens to yield at most, those in front among them.

    Raises:
        ValueError: If the text is shorter than one window, or ``limit`` is; or if a window has no room for any text.
    """
    leading = list(leading_tokens(tokenizer))
    own = check_count(length, "length") - len(leading)
    if own < 1:
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
        while len(window) >= own:
            if limit is not None and (count + 1) * length > limit:
                return
            yield leading + window[:own]
            window = window[own:]
            count += 1
    if not count:
        front = f", {len(leading)} of them in front of the text" if leading else ""
        raise ValueError(
            f"{path}: {len(window)} tokens are less than one window of {length}{front}. Use a shorter window."
        )
