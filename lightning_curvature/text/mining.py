"""Finding the windows of a corpus that a language model recites."""

import dataclasses
import logging
import os
import random
from typing import Any

from rapidfuzz.distance import LCSseq
from torch import nn
from tqdm import tqdm

from lightning_curvature._checks import check_count, check_share
from lightning_curvature.text.corpus import read_documents
from lightning_curvature.text.evaluation import recited
from lightning_curvature.text.leading import leading_tokens
from lightning_curvature.text.sequences import PromptedSequence

log = logging.getLogger(__name__)


def mine(
    model: nn.Module,
    tokenizer: Any,
    corpus: str | os.PathLike[str],
    *,
    prefix: int = 64,
    suffix: int = 48,
    stride: int | None = None,
    windows: int = 10_000,
    similarity: float = 0.5,
    batch_size: int = 32,
    seed: int = 0,
) -> list[PromptedSequence]:
    """Find windows of a corpus that a model recites.

    Args:
        model: A transformers causal LM in eval mode.
        tokenizer: Its tokenizer.
        corpus: Text or JSON lines, see :func:`lightning_curvature.text.corpus.read_documents`.
        prefix: Tokens of the text to prompt with, behind the tokens that the tokenizer puts in front.
        suffix: Tokens to recite.
        stride: Tokens between the starts of candidate windows in a document; by default windows do not overlap.
        windows: Candidates to test at most; of more, a random sample.
        similarity: Length of the longest common subsequence of two windows over the length of the longer window, in
            (0, 1]. Of two recited windows that are as similar or more, the first is kept.
        batch_size: Windows per forward pass.
        seed: Seed of the sample.

    Returns:
        Recited windows in the random order of the sample; no two of them are near-duplicates.

    Raises:
        ValueError: If no document is as long as a window, or the model cannot read one.
    """
    check_share(similarity, "similarity")
    asked = candidates(tokenizer, corpus, prefix=prefix, suffix=suffix, stride=stride, windows=windows, seed=seed)
    return mine_among(model, tokenizer, asked, similarity, batch_size)


def candidates(
    tokenizer: Any,
    corpus: str | os.PathLike[str],
    *,
    prefix: int,
    suffix: int,
    stride: int | None,
    windows: int,
    seed: int,
) -> list[PromptedSequence]:
    """Return windows to test, a random sample; arguments and errors as :func:`mine`."""
    length = check_count(prefix, "prefix") + check_count(suffix, "suffix")
    step = length if stride is None else check_count(stride, "stride")
    check_count(windows, "windows")
    leading = leading_tokens(tokenizer)
    documents = list(read_documents(corpus, tokenizer))
    starts = [(n, i) for n, ids in enumerate(documents) for i in range(0, len(ids) - length + 1, step)]
    if not starts:
        longest = max(map(len, documents))
        raise ValueError(
            f"{corpus}: its longest document has {longest} tokens, a window has {prefix} + {suffix}. Use shorter ones."
        )
    sample = random.Random(seed).sample(starts, min(windows, len(starts)))
    return [
        PromptedSequence(
            leading + tuple(documents[n][i : i + prefix]),
            tuple(documents[n][i + prefix : i + length]),
            num_leading=len(leading),
        )
        for n, i in sample
    ]


def mine_among(
    model: nn.Module, tokenizer: Any, asked: list[PromptedSequence], similarity: float, batch_size: int
) -> list[PromptedSequence]:
    """Return the windows of ``asked`` that a model recites; other arguments and results as :func:`mine`."""
    with tqdm(total=len(asked), unit="window", desc="Testing for recitation", disable=None) as progress:
        matches = recited(model, asked, batch_size, progress.update)
    kept = distinct(matches, similarity)
    log.info(
        "%d of %d windows are recited, %d of them near-duplicates of others.",
        len(matches),
        len(asked),
        len(matches) - len(kept),
    )
    return [
        dataclasses.replace(
            sequence,
            prefix_text=tokenizer.decode(sequence.prefix_ids[sequence.num_leading :]),
            suffix_text=tokenizer.decode(sequence.suffix_ids),
        )
        for sequence in kept
    ]


def distinct(sequences: list[PromptedSequence], similarity: float) -> list[PromptedSequence]:
    """Return sequences without those that resemble an earlier one."""
    kept: list[PromptedSequence] = []
    for sequence in sequences:
        if all(LCSseq.normalized_similarity(_text(sequence), _text(earlier)) < similarity for earlier in kept):
            kept.append(sequence)
    return kept


def _text(sequence: PromptedSequence) -> tuple[int, ...]:
    return sequence.ids[sequence.num_leading :]
