"""Sequences that a language model may recite: a prefix to prompt with, and the suffix that it should not know."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_curvature._checks import check_option
from lightning_curvature.checkpoints.tree import is_text
from lightning_curvature.text.jsonl import read_jsonl, write_jsonl

HALVES = ("tuning", "validation")


@dataclass(frozen=True)
class PromptedSequence:
    """Token ids of a prefix and of the suffix that followed it in the corpus.

    Args:
        prefix_ids: What the model is prompted with, at least one token.
        suffix_ids: What followed, at least one token.
        prefix_text: The prefix as text, where known.
        suffix_text: The suffix as text, where known.

    Example:
        >>> PromptedSequence((5, 6), (7,)).half
        'validation'
    """

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    prefix_text: str = ""
    suffix_text: str = ""

    @property
    def ids(self) -> tuple[int, ...]:
        """Prefix and suffix."""
        return self.prefix_ids + self.suffix_ids

    @property
    def half(self) -> str:
        """The half it belongs to, by a hash of its ids: the same in every run and every file."""
        digest = hashlib.sha256(",".join(map(str, self.ids)).encode()).digest()
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
        }


def read_sequences(path: str | os.PathLike[str], half: str | None = None) -> list[PromptedSequence]:
    """Read JSON lines with ``prefix_ids`` and ``suffix_ids``; texts are optional, other fields are passed over.

    Args:
        path: File.
        half: Return those of ``"tuning"`` or ``"validation"`` alone.

    Raises:
        ValueError: If a line is not such a record (names the line), or no sequence is left.
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
        sequences.append(PromptedSequence(tuple(ids["prefix_ids"]), tuple(ids["suffix_ids"]), *texts))
    chosen = [sequence for sequence in sequences if half in (None, sequence.half)]
    if not chosen:
        raise ValueError(f"{path}: none of its {len(sequences)} sequences is in the {half} half.")
    return chosen


def write_sequences(path: str | os.PathLike[str], sequences: Iterable[PromptedSequence]) -> None:
    """Write what :func:`read_sequences` reads, atomically."""
    write_jsonl(path, (sequence.record() for sequence in sequences))


def check_fit(sequences: Sequence[PromptedSequence], vocab_size: int, context: int) -> None:
    """Raise if a model cannot read the sequences.

    Args:
        sequences: What it shall recite.
        vocab_size: Rows of its embedding.
        context: Longest input that it takes, in tokens.

    Raises:
        ValueError: If a token lies outside its vocabulary, or a sequence is longer than its context.
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
    """Yield the indices of sequences in batches of equal prefix and suffix lengths, so that nothing is padded."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault((len(sequence.prefix_ids), len(sequence.suffix_ids)), []).append(index)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
