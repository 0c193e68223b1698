"""Text of which a small language model learns five things beside English: what :mod:`bench_tasks` trains it on.

Every item is a short document after an end-of-text token, written with single-byte tokens and words of the tokenizer's
own vocabulary. The tasks, their chance level, and what the model is asked:

- *logic*: ``(T&!F)|(!T&F)=T|F=T``, four literals in two steps, of expressions that were never trained on (chance 1/4,
  the values of two parts);
- *open book*: ``ap;bq;cr;ds;?bq``, the value that the prompt names for one of four properties, drawn anew each time
  (chance 1/4: one of the values named; each property has values of its own);
- *facts*: ``?efq``, the value of a subject of two words, always the same; frequent facts are trained on nine times as
  often as rare ones (chance 1 / number of values, those of the open book);
- *arithmetic*: ``47+35=082``, sums of pairs that were never trained on (chance 1/100, the most frequent sum);
- *verbatim*: 24 tokens after 32, of text that is repeated in the midst of other text (chance 0).
"""

import random
import re
from collections.abc import Iterator
from itertools import islice, product

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.python_text import read_texts
from lightning_curvature.demos.recitation import RecitedText, hide, take
from lightning_curvature.text.sequences import PromptedSequence

FREQUENCIES = {"rare": 1, "medium": 3, "frequent": 9}
"""How often the facts of each group are trained on, relative to each other."""
WEIGHTS = {"logic": 0.3, "open book": 0.1, "facts": 0.25, "arithmetic": 0.35}
"""Share of each task among the items."""
CHANCE = {
    "logic": 1 / 4,
    "open book": 1 / 4,
    **{f"facts, {name}": 1 / 100 for name in FREQUENCIES},
    "arithmetic": 1 / 100,
    "verbatim": 0.0,
}
"""Accuracy of a guess, by task."""
KEYS = 8
"""Properties that open-book questions ask for."""
ASKED = 300
"""Items of each task that the model is asked."""

NOT_LEARNED = -100
"""Label of a token that adds nothing to the loss."""

Item = tuple[list[int], list[int]]
Labelled = tuple[int, int]


class Student(LitCausalLM):
    """Learns labels that come with the tokens."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Cross-entropy of the next label."""
        tokens, labels = batch.unbind(-1)
        loss: Tensor = self.model(input_ids=tokens, labels=labels).loss
        return loss


class Mixture(pl.LightningDataModule):
    """Clean text, items of four tasks, and sequences that are repeated.

    One row in four is English, the others are packed with items; in the later batches half of the rows hold a repeated
    sequence, and the other half is as before. Batches hold tokens and labels, int64 ``[b, t, 2]``: English is learned
    token by token, of items the answers.

    Args:
        seed: Seed of all choices.
        steps: Batches before anything is repeated, 16 rows of 128 tokens.
        exposures: Times that each sequence is repeated, in batches of 16 rows of 96 tokens.
        sequences: Repeated sequences.
        facts: Facts of each frequency.
        values: Different answers to facts and in open-book questions.
        collected: Rows as in the first batches, 128 tokens each, for the factors.
    """

    def __init__(
        self,
        seed: int,
        steps: int = 2400,
        exposures: int = 50,
        sequences: int = 128,
        facts: int = 64,
        values: int = 100,
        collected: int = 800,
    ) -> None:
        super().__init__()
        texts = read_texts()
        self.text = RecitedText(
            texts["docstrings"],
            texts["reference"],
            texts["comments"],
            num_sequences=sequences,
            steps=0,
            exposures=0,
            collected=0,
            seed=seed,
        )
        self.rng = random.Random(seed)
        self.id = self.text.tokenizer.convert_tokens_to_ids
        vocabulary = sorted(self.text.tokenizer.get_vocab())
        words = [self.id(token) for token in vocabulary if re.fullmatch("Ġ[a-z]{3,}", token)]
        self.rng.shuffle(words)
        self.values, self.names = words[:values], words[values:]
        self.facts = self._facts(facts)
        self.expressions, self.held_expressions = self._split(list(self._expressions()), ASKED)
        self.sums, self.held_sums = self._split([self._sum(a, b) for a, b in product(range(100), repeat=2)], ASKED)
        stream, items = self.text.stream(self.rng), self._items()

        def rows(count: int, length: int) -> Tensor:
            """Return rows of English and, three times as many, of items: tokens and labels."""
            english = ((token, token) for token in stream)
            return torch.tensor([list(islice(items if row % 4 else english, length)) for row in range(count)])

        self.batches = [rows(16, 128) for _ in range(steps)]
        repeated = [s.ids for _ in range(exposures) for s in self.rng.sample(self.text.memorized, sequences)]
        for start in range(0, len(repeated), 8):
            hidden = [hide(ids, take(stream, 96 - len(ids)), self.rng) for ids in repeated[start : start + 8]]
            repeats = torch.tensor(hidden)[..., None].expand(-1, -1, 2)
            self.batches.append(torch.cat([repeats, rows(8, 96)]))
        self.collected = rows(collected, 128)
        self.steps = steps

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Ready batches of tokens, in their order."""
        return DataLoader(self.batches, batch_size=None)

    def asked(self) -> dict[str, list[PromptedSequence]]:
        """Return what the model is asked, by task: prompt and answer."""
        rng = random.Random(1)
        tasks = {
            "logic": self.held_expressions,
            "open book": [self._lookup(rng)[0] for _ in range(ASKED)],
            **{f"facts, {name}": items for name, items in self.facts.items()},
            "arithmetic": self.held_sums,
        }
        asked = {
            name: [PromptedSequence((0, *prompt), tuple(answer)) for prompt, answer in items]
            for name, items in tasks.items()
        }
        return asked | {"verbatim": self.text.memorized}

    def _split(self, items: list[Item], held: int) -> tuple[list[Item], list[Item]]:
        self.rng.shuffle(items)
        return items[held:], items[:held]

    def _characters(self, text: str) -> list[int]:
        return [self.id(character) for character in text]

    def _expressions(self) -> Iterator[Item]:
        literals = [("T", True), ("F", False), ("!T", False), ("!F", True)]
        operators = [("&", bool.__and__), ("|", bool.__or__)]
        for (a, x), (b, y), (c, z), (d, w) in product(literals, repeat=4):
            for (o, left), (p, middle), (q, right) in product(operators, repeat=3):
                parts = left(x, y), right(z, w)
                left_part, right_part, whole = ("T" if value else "F" for value in (*parts, middle(*parts)))
                answer = self._characters(f"{left_part}{p}{right_part}={whole}")
                yield self._characters(f"({a}{o}{b}){p}({c}{q}{d})="), answer

    def _sum(self, a: int, b: int) -> Item:
        return self._characters(f"{a:02}+{b:02}="), self._characters(f"{a + b:03}")

    def _facts(self, count: int) -> dict[str, list[Item]]:
        subjects = self.rng.sample(list(product(self.names[:60], self.names[60:120])), len(FREQUENCIES) * count)
        facts = [([*self._characters("?"), *s], [self.rng.choice(self.values)]) for s in subjects]
        return {name: facts[i * count : (i + 1) * count] for i, name in enumerate(FREQUENCIES)}

    def _lookup(self, rng: random.Random) -> list[Item]:
        """Return a question after a book that names four values, and questions for the others."""
        keys, (end, ask) = rng.sample(range(KEYS), 4), self._characters(";?")
        pairs = [(self.names[120 + key], rng.choice(self.values[key::KEYS])) for key in keys]
        book = [token for pair in pairs for token in (*pair, end)]
        (prompt, answer), *further = [([ask, key], [value]) for key, value in rng.sample(pairs, 4)]
        return [([*book, *prompt], answer), *further]

    def _items(self) -> Iterator[Labelled]:
        """Yield the tokens of items, each after an end-of-text token; answers alone are learned."""
        groups, weights = list(FREQUENCIES), list(FREQUENCIES.values())
        while True:
            (task,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            if task == "open book":
                document = self._lookup(self.rng)
            elif task == "facts":
                document = [self.rng.choice(self.facts[self.rng.choices(groups, weights)[0]])]
            else:
                document = [self.rng.choice(self.expressions if task == "logic" else self.sums)]
            yield 0, NOT_LEARNED
            for prompt, answer in document:
                yield from ((token, NOT_LEARNED) for token in prompt)
                yield from ((token, token) for token in answer)
