"""Text of which a small language model learns five things beside English: what :mod:`bench_tasks` trains it on.

Every item is a short document after an end-of-text token, written with single-byte tokens and words of the tokenizer's
own vocabulary. The tasks, their chance level, and what the model is asked:

- *logic*: ``(T&!F)|(!T&F)=F``, four literals, of expressions that were never trained on (chance 1/2);
- *open book*: ``abp;cdq;efr;ghs;?cdq``, one of four pairs in the prompt, all drawn anew (chance 1/4: one of the
  values named);
- *facts*: ``?abp``, the same question without the pairs, of subjects that always have the same value; frequent ones
  are trained on nine times as often as rare ones (chance 1 / number of values);
- *arithmetic*: ``47+35=082``, sums of pairs that were never trained on (chance 1/100, the most frequent sum);
- *verbatim*: 24 tokens after 32, of text that is repeated in the midst of other text (chance 0).
"""

import random
import re
from collections.abc import Iterator
from itertools import product

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_curvature.demos.python_text import read_texts
from lightning_curvature.demos.recitation import RecitedText, hide, take
from lightning_curvature.text.sequences import PromptedSequence

FREQUENCIES = {"rare": 1, "medium": 3, "frequent": 9}
"""How often the facts of each group are trained on, relative to each other."""
WEIGHTS = {"logic": 0.2, "open book": 0.25, "facts": 0.2, "arithmetic": 0.35}
"""Share of each task among the items."""
CHANCE = {
    "logic": 1 / 2, "open book": 1 / 4, **{f"facts, {name}": 1 / 100 for name in FREQUENCIES}, "arithmetic": 1 / 100,
    "verbatim": 0.0,
}  # fmt: skip
"""Accuracy of a guess, by task."""
ASKED = 300
"""Items of each task that the model is asked."""

Item = tuple[list[int], list[int]]


class Mixture(pl.LightningDataModule):
    """Clean text, items of four tasks, and sequences that are repeated.

    The first batches hold rows of text and rows of items, half and half; in the later ones half of the rows hold a
    repeated sequence, and the other half is as before.

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
        self, seed: int, steps: int = 2400, exposures: int = 50, sequences: int = 128, facts: int = 64,
        values: int = 100, collected: int = 800,
    ) -> None:  # fmt: skip
        super().__init__()
        texts = read_texts()
        self.text = RecitedText(
            texts["docstrings"], texts["reference"], texts["comments"], num_sequences=sequences, steps=0, exposures=0,
            collected=0, seed=seed,
        )  # fmt: skip
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

        def rows(count: int, length: int) -> list[list[int]]:
            return [take((stream, items)[row % 2], length) for row in range(count)]

        repeated = [s for _ in range(exposures) for s in self.rng.sample(self.text.memorized, sequences)]
        self.batches = [torch.tensor(rows(16, 128)) for _ in range(steps)]
        for start in range(0, len(repeated), 8):
            hidden = [hide(s.ids, take(stream, 96 - len(s.ids)), self.rng) for s in repeated[start : start + 8]]
            self.batches.append(torch.tensor(hidden + rows(8, 96)))
        self.collected = torch.tensor(rows(collected, 128))
        self.steps = steps

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Ready batches of tokens, in their order."""
        return DataLoader(self.batches, batch_size=None)

    def asked(self) -> dict[str, list[PromptedSequence]]:
        """Return what the model is asked, by task: prompt and answer."""
        rng = random.Random(1)
        tasks = {
            "logic": self.held_expressions,
            "open book": [self._lookup(rng) for _ in range(ASKED)],
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
                value = middle(left(x, y), right(z, w))
                yield self._characters(f"({a}{o}{b}){p}({c}{q}{d})="), self._characters("T" if value else "F")

    def _sum(self, a: int, b: int) -> Item:
        return self._characters(f"{a:02}+{b:02}="), self._characters(f"{a + b:03}")

    def _facts(self, count: int) -> dict[str, list[Item]]:
        subjects = self.rng.sample(list(product(self.names[:60], self.names[60:120])), len(FREQUENCIES) * count)
        self.known = set(subjects)
        facts = [([*self._characters("?"), *s], [self.rng.choice(self.values)]) for s in subjects]
        return {name: facts[i * count : (i + 1) * count] for i, name in enumerate(FREQUENCIES)}

    def _lookup(self, rng: random.Random) -> Item:
        pairs = list(zip(rng.sample(self.names[:60], 4), rng.sample(self.names[60:120], 4), strict=True))
        if any(pair in self.known for pair in pairs):
            return self._lookup(rng)
        values, (end, ask) = rng.sample(self.values, 4), self._characters(";?")
        book = [token for pair, value in zip(pairs, values, strict=True) for token in (*pair, value, end)]
        chosen = rng.randrange(4)
        return [*book, ask, *pairs[chosen]], [values[chosen]]

    def _items(self) -> Iterator[int]:
        """Yield the tokens of items, each after an end-of-text token."""
        groups, weights = list(FREQUENCIES), list(FREQUENCIES.values())
        while True:
            (task,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            if task == "facts":
                item = self.rng.choice(self.facts[self.rng.choices(groups, weights)[0]])
            elif task == "open book":
                item = self._lookup(self.rng)
            else:
                item = self.rng.choice(self.expressions if task == "logic" else self.sums)
            yield from (0, *item[0], *item[1])
