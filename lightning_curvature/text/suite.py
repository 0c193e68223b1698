"""All metrics of a saved language model on files: what ``lightning-curvature evaluate`` runs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.text.corpus import token_windows
from lightning_curvature.text.evaluation import Baseline, evaluate_sequences
from lightning_curvature.text.examples import continue_texts, side_by_side
from lightning_curvature.text.leading import leading_tokens
from lightning_curvature.text.models import check_vocabulary, load_model, load_tokenizer
from lightning_curvature.text.recall import evaluate_recall, read_questions
from lightning_curvature.text.sequences import PromptedSequence, read_sequences
from lightning_curvature.text.stress import positional_stress

NUM_EXAMPLES = 10


class Suite:
    """Files to measure a model on, read and checked once.

    Args:
        model: Folder of a Hugging Face causal LM and its tokenizer.
        sequences: JSON lines with ``prefix_ids`` and ``suffix_ids``.
        half: ``"tuning"`` or ``"validation"``: use this half of the sequences alone.
        corpus: Text, or JSON lines with ``text``.
        recall: JSON lines with ``prompt`` and ``answers``.
        stress: Also run the positional stress test on the sequences.
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window.
        batch_size: Sequences per forward pass.

    Raises:
        ValueError: If there is no file to measure on, or one of them is not as described.
    """

    def __init__(
        self,
        model: Path,
        sequences: Path | None = None,
        half: str | None = None,
        corpus: Path | None = None,
        recall: Path | None = None,
        stress: bool = False,
        tokens: int = 100_000,
        context: int = 128,
        batch_size: int = 32,
    ) -> None:
        if sequences is None and corpus is None and recall is None:
            raise ValueError("Nothing to measure on: give at least one of sequences, corpus and recall.")
        if stress and sequences is None:
            raise ValueError("The positional stress test needs sequences.")
        self.folder, self.stress, self.batch_size = model, stress, batch_size
        self.tokenizer = load_tokenizer(model)
        self.leading = leading_tokens(self.tokenizer)
        self.sequences: list[PromptedSequence] = (
            [] if sequences is None else read_sequences(sequences, half, self.leading)
        )
        self.windows = (
            None if corpus is None else torch.tensor(list(token_windows(corpus, self.tokenizer, context, tokens)))
        )
        self.questions = [] if recall is None else read_questions(recall)
        self.filler = [] if self.windows is None else self.windows[0, len(self.leading) :].tolist()

    def run(self, checkpoint: Path | None = None, reference: bool = False) -> dict[str, dict[str, float]]:
        """Measure the model, and with ``reference`` the weights in its folder before that of ``checkpoint``.

        Returns:
            Metrics by name, under ``"model"``, or under ``"before"`` and ``"after"``.

        Raises:
            ValueError: If ``reference`` is asked for without a checkpoint to compare with.
        """
        if not reference:
            return {"model": self._measure(self._load(checkpoint), None)}
        if checkpoint is None:
            raise ValueError("A reference is the model before an edit: name the edited checkpoint, too (--checkpoint).")
        before = self._load(None)
        baseline = None if self.windows is None else self._baseline(before, self.windows)
        return {
            "before": self._measure(before, baseline),
            "after": self._measure(self._load(checkpoint), baseline),
        }

    def _load(self, checkpoint: Path | None) -> Any:
        model = load_model(self.folder, checkpoint)
        check_vocabulary(model, self.tokenizer)
        return model

    def _baseline(self, model: Any, windows: Tensor) -> Baseline:
        return Baseline(model, windows, num_leading=len(self.leading))

    def _measure(self, model: Any, baseline: Baseline | None) -> dict[str, float]:
        results: dict[str, float] = {}
        if self.sequences:
            results |= evaluate_sequences(model, self.sequences, self.batch_size)
        if self.windows is not None:
            own = baseline or self._baseline(model, self.windows)
            found = own.evaluate(model)
            results |= found if baseline else {"perplexity": found["perplexity"]}
        if self.questions:
            results |= evaluate_recall(model, self.tokenizer, self.questions, self.batch_size)
        if self.stress:
            moved = positional_stress(
                model, self.sequences, filler=self.filler, batch_size=self.batch_size, leading=self.leading
            )
            results |= {f"{name}_shift_{shift:+d}": value for shift, found in moved.items()
                        for name, value in found.items()}  # fmt: skip
        return results


def write_examples(suite: Suite, checkpoint: Path | None, reference: bool, path: Path) -> None:
    """Write continuations of ten sequences and ten ordinary prompts before and after an edit, as Markdown.

    Raises:
        ValueError: If there is nothing to compare, or nothing to continue.
    """
    if not (reference and suite.sequences):
        raise ValueError("Examples are continuations before and after: they need --reference and --sequences.")
    sections = {"Sequences": suite.sequences[:NUM_EXAMPLES]}
    if suite.windows is not None:
        half = suite.windows.shape[1] // 2
        sections["Ordinary text"] = [
            PromptedSequence(tuple(row[:half]), tuple(row[half:]), num_leading=len(suite.leading))
            for row in suite.windows[:NUM_EXAMPLES].tolist()
        ]
    before, after = load_model(suite.folder), load_model(suite.folder, checkpoint)
    page = side_by_side(
        {
            title: (
                asked,
                continue_texts(before, suite.tokenizer, asked),
                continue_texts(after, suite.tokenizer, asked),
            )
            for title, asked in sections.items()
        },
        suite.tokenizer,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
