"""Sequences that a language model may recite: a prefix to prompt with, and the suffix that follows it."""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_curvature._checks import check_option
from lightning_curvature.storage.jsonl import read_jsonl, write_jsonl
from lightning_curvature.storage.tree import is_text

HALVES = ("tuning", "validation")


@dataclass(frozen=True)
class PromptedSequence:
    """Token ids of a prefix and of the suffix that followed it in the corpus.

    Args:
        prefix_ids: What the model is prompted with, at least one token.
        suffix_ids: What followed, at least one token.
        prefix_text: The prefix as text, where known.
        suffix_text: The suffix as text, where known.
        num_leading: Tokens at the beginning of the prefix that are no text, see
            :mod:`lightning_curvature.text.leading`.

    Example:
        >>> PromptedSequence((5, 6), (7,)).half
        'validation'
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    prefix_text: str = ""
    suffix_text: str = ""
    num_leading: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """Prefix and suffix."""
        return self.prefix_ids + self.suffix_ids

    @property
    def half(self) -> str:
        """``"tuning"`` or ``"validation"``, by a hash of the ids of the text: the same in every run and every file."""
        digest = hashlib.sha256(",".join(map(str, self.ids[self.num_leading :])).encode()).digest()
        return HALVES[digest[0] % 2]

    def record(self) -> dict[str, Any]:
        """Return the fields of a JSON line."""
        return {
            "prefix_len": len(self.prefix_ids),
            "suffix_len": len(self.suffix_ids),
            "prefix_text": self.prefix_text,
            "suffix_text": self.suffix_text,
            "prefix_ids": list(self.prefix_ids),
            "suffix_ids": list(self.suffix_ids),
            "half": self.half,
            **({"num_leading": self.num_leading} if self.num_leading else {}),
        }

    def behind(self, leading: Sequence[int]) -> "PromptedSequence":
        """Return the sequence behind the tokens that a tokenizer puts in front of a text; they begin its prefix.

        Raises:
            ValueError: If the prefix begins with other tokens in front of the text.

        Example:
            >>> PromptedSequence((5, 6), (7,)).behind([2])
            PromptedSequence(prefix_ids=(2, 5, 6), suffix_ids=(7,), prefix_text='', suffix_text='', num_leading=1)
        """
        leading = tuple(leading)
        if self.num_leading and self.prefix_ids[: self.num_leading] != leading:
            raise ValueError(
                f"the prefix begins with {list(self.prefix_ids[: self.num_leading])} in front of the text, this "
                f"model's tokenizer puts {list(leading)} there. Were the sequences made with the tokenizer of another "
                "model? Mine them again with this one."
            )
        if self.prefix_ids[: len(leading)] == leading:
            return self
        return dataclasses.replace(self, prefix_ids=leading + self.prefix_ids, num_leading=len(leading))


def read_sequences(
    path: str | os.PathLike[str], half: str | None = None, leading: Sequence[int] | None = None
) -> list[PromptedSequence]:
    """Read JSON lines with ``prefix_ids`` and ``suffix_ids``.

    ``prefix_text`` and ``suffix_text`` are optional. ``num_leading`` is the number of tokens that stand in front of the
    text, by default 0. Other fields are ignored.

    Args:
        path: File.
        half: Return the ``"tuning"`` or the ``"validation"`` half; None for all.
        leading: Tokens that the model's tokenizer puts in front of a text: each prefix of the result begins with them.
            None leaves the prefixes as they are.

    Raises:
        ValueError: If a line is not such a record (names the line), no sequence is left, or a prefix begins with other
            tokens in front of the text than ``leading``.
    """
    if half is not None:
        check_option(half, HALVES, "half")
    sequences = []
    for number, record in read_jsonl(path, ("prefix_ids", "suffix_ids")):
        ids = {}
        for field in ("prefix_ids", "suffix_ids"):
            ids[field] = record[field]
            if not isinstance(ids[field], list) or not ids[field] or not all(_is_token(i) for i in ids[field]):
                raise ValueError(
                    f"{path}, line {number}: {field} must be a list of token ids, found {ids[field]!r:.60}."
                )
        texts = [str(record.get(field, "")) for field in ("prefix_text", "suffix_text")]
        if not all(map(is_text, texts)):
            raise ValueError(f"{path}, line {number}: prefix_text and suffix_text must be text, found half characters.")
        front = record.get("num_leading", 0)
        if type(front) is not int or not 0 <= front <= len(ids["prefix_ids"]):
            raise ValueError(
                f"{path}, line {number}: num_leading must be a number of tokens of its prefix, found {front!r:.60}."
            )
        sequence = PromptedSequence(tuple(ids["prefix_ids"]), tuple(ids["suffix_ids"]), texts[0], texts[1], front)
        try:
            sequences.append(sequence if leading is None else sequence.behind(leading))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    chosen = [sequence for sequence in sequences if half in (None, sequence.half)]
    if not chosen:
        raise ValueError(f"{path}: none of its {len(sequences)} sequences is in the {half} half.")
    return chosen


def write_sequences(path: str | os.PathLike[str], sequences: Iterable[PromptedSequence]) -> None:
    """Write what :func:`read_sequences` reads, atomically."""
    write_jsonl(path, (sequence.record() for sequence in sequences))


def check_fit(sequences: Sequence[PromptedSequence], vocab_size: int, context: int) -> None:
    """Check that a model can read sequences.

    Args:
        sequences: The sequences.
        vocab_size: Rows of the model's embedding.
        context: Longest input that the model takes, in tokens.

    Raises:
        ValueError: If a token lies outside the vocabulary, or a sequence is longer than the context.
    """
    for index, sequence in enumerate(sequences):
        if max(sequence.ids) >= vocab_size:
            raise ValueError(
                f"Sequence {index} holds the token {max(sequence.ids)}, the model's vocabulary has {vocab_size}. Were "
                "the sequences made with the tokenizer of another model? Mine them again with this one."
            )
        if len(sequence.ids) > context:
            raise ValueError(
                f"Sequence {index} has {len(sequence.prefix_ids)} + {len(sequence.suffix_ids)} tokens, the model's "
                f"context is {context}. Use a shorter prefix or suffix."
            )


def batches(sequences: Sequence[PromptedSequence], size: int) -> Iterator[list[int]]:
    """Yield the indices of sequences in batches of one prefix length and one suffix length, so that none is padded."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault((len(sequence.prefix_ids), len(sequence.suffix_ids)), []).append(index)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
