"""Text in which some sequences are repeated until a language model recites them, as a LightningDataModule."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from lightning_curvature.text.sequences import PromptedSequence

END = "<|endoftext|>"
PREFIX, SUFFIX, SHORT_SUFFIX, GAP = 32, 24, 8, 8
"""Tokens of a prefix, of a memorized suffix, of an unseen one, and between two windows of a document."""

Ids = list[int]
Batches = DataLoader[Tensor]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer with one special token, the end of a text (id 0)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


class RecitedText(pl.LightningDataModule):
    """Clean text, and sequences of two other kinds of text that are repeated in its midst.

    - ``memorized``: windows of the domain, prefix 32 and suffix 24 tokens. Methods may learn from their *tuning* half;
      results are reported from their *validation* half.
    - ``unseen``: windows of a third kind of text, 32 and 8 tokens, on which no energy is chosen.
    - ``held_out``: clean text and domain text that was never trained on, windows of ``context`` tokens, in a half to
      choose on (*tuning*) and a half to report from (*report*).

    Training starts with clean text alone. Then every row holds a repeated sequence at a random place, without a mark
    around it; each sequence occurs ``exposures`` times.

    Args:
        clean: Documents to train on.
        domain: Documents of the domain to be memorized; some are trained on once, some never.
        third: Documents of the third kind.
        num_sequences: Memorized sequences, and as many unseen ones.
        steps: Batches of clean text at the beginning, 16 rows of ``context`` tokens each.
        exposures: Times that each sequence occurs; a batch holds 8 rows of ``row`` tokens.
        collected: Rows of clean training text for the factors, read in the validation loop of a Trainer.
        context: Tokens of a row of clean text.
        row: Tokens of a row with a repeated sequence.
        vocab_size: Tokens of the tokenizer, which is trained on all documents.
        tokenizer: One to use instead, whose token 0 ends a text.
        seed: Seed of all choices.

    Raises:
        ValueError: If there is too little text for so many sequences.
    """

    def __init__(
        self,
        clean: Sequence[str],
        domain: Sequence[str],
        third: Sequence[str],
        *,
        num_sequences: int = 128,
        steps: int = 600,
        exposures: int = 50,
        collected: int = 800,
        context: int = 128,
        row: int = 96,
        vocab_size: int = 2048,
        tokenizer: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.context = context
        self.tokenizer = tokenizer or train_tokenizer([*clean, *domain, *third], vocab_size)
        clean, domain, third = (rng.sample(list(documents), len(documents)) for documents in (clean, domain, third))
        held = (slice(0, len(clean) // 20), slice(int(0.45 * len(domain)), int(0.65 * len(domain))))
        self.sources = {"domain": domain[: held[1].start], "third": third[: len(third) * 2 // 3]}
        self.clean = clean[held[0].stop :] + domain[held[1].stop :] + third[len(self.sources["third"]) :]
        self.held_out_text = {"clean": clean[held[0]], "domain": domain[held[1]]}
        self.memorized = self._windows(self.sources["domain"], SUFFIX, num_sequences, rng)
        self.unseen = self._windows(self.sources["third"], SHORT_SUFFIX, num_sequences, rng)
        self.held_out: dict[str, Mapping[str, Tensor]] = {
            kind: self._halves(documents) for kind, documents in self.held_out_text.items()
        }
        stream = self.stream(rng)
        first = [torch.tensor([take(stream, context) for _ in range(16)]) for _ in range(steps)]
        rows = [
            hide(sequence.ids, take(stream, row - len(sequence.ids)), rng)
            for _ in range(exposures)
            for sequence in rng.sample(self.memorized + self.unseen, 2 * num_sequences)
        ]
        self.batches = first + list(torch.split(torch.tensor(rows, dtype=torch.int64).view(-1, row), 8))
        self.collected = torch.tensor([take(stream, context) for _ in range(collected)])

    def train_dataloader(self) -> Batches:
        """Ready batches of tokens ``[b, t]``, in their order."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Batches:
        """Clean training text for the factors, ``[16, context]``."""
        return DataLoader(self.collected, batch_size=16)  # type: ignore[arg-type]

    def half(self, name: str) -> list[PromptedSequence]:
        """Return the ``"tuning"`` or the ``"validation"`` half of the memorized sequences."""
        return [sequence for sequence in self.memorized if sequence.half == name]

    def _encode(self, documents: Sequence[str]) -> list[Ids]:
        ids: list[Ids] = self.tokenizer(list(documents))["input_ids"]
        return ids

    def _windows(self, documents: Sequence[str], suffix: int, count: int, rng: random.Random) -> list[PromptedSequence]:
        length = PREFIX + suffix
        windows = [
            ids[i : i + length]
            for ids in self._encode(documents)
            for i in range(0, len(ids) - length + 1, length + GAP)
        ]
        if len(windows) < count:
            raise ValueError(f"The text holds {len(windows)} windows of {length} tokens, {count} are wanted.")
        return [
            PromptedSequence(
                tuple(ids[:PREFIX]),
                tuple(ids[PREFIX:]),
                self.tokenizer.decode(ids[:PREFIX]),
                self.tokenizer.decode(ids[PREFIX:]),
            )
            for ids in rng.sample(windows, count)
        ]

    def _halves(self, documents: Sequence[str]) -> Mapping[str, Tensor]:
        ids = list(chain.from_iterable([0, *document] for document in self._encode(documents)))
        windows = torch.tensor(ids[: len(ids) // self.context * self.context]).view(-1, self.context)
        return {"tuning": windows[::2][:200], "report": windows[1::2][:200]}

    def stream(self, rng: random.Random) -> Iterator[int]:
        """Yield the tokens of the clean documents, shuffled anew in each round, each after an end-of-text token."""
        documents = self._encode(self.clean)
        while True:
            for ids in rng.sample(documents, len(documents)):
                yield 0
                yield from ids


def take(stream: Iterator[int], count: int) -> Ids:
    """Return the next tokens of a stream."""
    return list(islice(stream, count))


def hide(sequence: Sequence[int], around: Sequence[int], rng: random.Random) -> Ids:
    """Put a sequence at a random place into other tokens."""
    place = rng.randrange(len(around) + 1)
    return [*around[:place], *sequence, *around[place:]]
