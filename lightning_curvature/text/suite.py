"""All metrics of a saved language model on files, for ``lightning-curvature evaluate``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_curvature._checks import listing
from lightning_curvature.text.evaluation import WINDOW, Baseline, evaluate_sequences, perplexity
from lightning_curvature.text.examples import continue_sections, write_side_by_side
from lightning_curvature.text.models import check_vocabulary, load_model, put_weights
from lightning_curvature.text.recall import evaluate_recall, read_questions
from lightning_curvature.text.saved import SavedModel
from lightning_curvature.text.sequences import PromptedSequence, read_sequences
from lightning_curvature.text.stress import positional_stress

NUM_EXAMPLES = 10
"""Sequences, and ordinary prompts, whose continuations are shown."""


class Suite:
    """Files to measure a model on. They are read and checked once, before the model is loaded.

    Args:
        model: Folder of a Hugging Face causal LM and its tokenizer.
        sequences: JSON lines with ``prefix_ids`` and ``suffix_ids``.
        half: Use the ``"tuning"`` or the ``"validation"`` half of the sequences; by default all.
        corpus: Text, or JSON lines with ``text``.
        recall: JSON lines with ``prompt`` and ``answers``.
        stress: Whether to run the positional stress test on the sequences too.
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window; by default 128, or what the model takes if that is less.
        batch_size: Sequences per forward pass.
        checkpoint: File or folder to take the weights from; by default the folder of the model.
        allow_globals: Classes that a file may hold besides tensors and primitives.

    Raises:
        ValueError: If a file is not as described, or the model cannot read its content.
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
        context: int | None = None,
        batch_size: int = 32,
        checkpoint: Path | None = None,
        allow_globals: Sequence[str] = (),
    ) -> None:
        self.saved = SavedModel(model, checkpoint, allow_globals)
        self.stress, self.batch_size = stress, batch_size
        self.tokenizer, self.leading = self.saved.tokenizer, self.saved.leading
        self.sequences: list[PromptedSequence] = (
            [] if sequences is None else read_sequences(sequences, half, self.leading)
        )
        self.saved.check_fit(self.sequences)
        self.windows = None if corpus is None else self.saved.windows(corpus, tokens, context, WINDOW)
        self.questions = [] if recall is None else read_questions(recall)
        self.filler = [] if self.windows is None else self.windows[0, len(self.leading) :].tolist()

    def run(self, reference: bool = False, examples: Path | None = None) -> dict[str, dict[str, float]]:
        """Measure the model, and with ``reference`` also what it was before.

        Args:
            reference: Measure the weights in the folder first, and the checkpoint's then.
            examples: With ``reference``, Markdown file for continuations of ten sequences and ten ordinary prompts
                before and after.

        Returns:
            The metrics, by name: under ``"model"``, or with ``reference`` under ``"before"`` and ``"after"``.
        """
        if not reference or self.saved.checkpoint is None:
            return {"model": self._measure(self.saved.load(), None, self.saved.source)}
        model = load_model(self.saved.folder)
        check_vocabulary(model, self.tokenizer)
        self._check_finite(model, self.saved.folder)
        num_leading, sections = len(self.leading), self._examples()
        baseline = None if self.windows is None else Baseline(model, self.windows, num_leading=num_leading)
        results = {"before": self._measure(model, baseline, self.saved.folder)}
        before = {} if examples is None else continue_sections(model, self.tokenizer, sections)
        put_weights(model, self.saved.checkpoint, self.saved.allow_globals)  # one model in memory, loaded once
        results["after"] = self._measure(model, baseline, self.saved.checkpoint)
        if examples is not None:
            after = continue_sections(model, self.tokenizer, sections)
            write_side_by_side(examples, sections, before, after, self.tokenizer)
        return results

    def _examples(self) -> dict[str, list[PromptedSequence]]:
        """Return what to continue, by the title of its section."""
        sections = {"Sequences": self.sequences[:NUM_EXAMPLES]}
        if self.windows is not None:
            half = (self.windows.shape[1] + len(self.leading)) // 2
            sections["Ordinary text"] = [
                PromptedSequence(tuple(row[:half]), tuple(row[half:]), num_leading=len(self.leading))
                for row in self.windows[:NUM_EXAMPLES].tolist()
                if half
            ]
        return sections

    def _check_finite(self, model: Any, what: str | os.PathLike[str]) -> None:
        """Raise ``ValueError`` if the logits of a few tokens are not finite: all metrics would be nan."""
        ids = torch.arange(min(8, self.saved.context, self.saved.vocabulary), device=next(model.parameters()).device)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits
        if logits.isfinite().all():
            return
        bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        raise ValueError(
            f"{what}: what the model says is not finite, and nothing can be measured. "
            + (f"NaN or infinite are weights of {listing(bad, 3)}." if bad else "Its weights are; they are too large.")
            + " Name a checkpoint from before the run diverged."
        )

    def _measure(self, model: Any, baseline: Baseline | None, what: str | os.PathLike[str]) -> dict[str, float]:
        """Return all metrics of a model; ``what`` names its weights in errors."""
        results: dict[str, float] = {}
        self._check_finite(model, what)
        if self.sequences:
            results |= evaluate_sequences(model, self.sequences, self.batch_size)
        if baseline is not None:
            results |= baseline.evaluate(model)
        elif self.windows is not None:
            results["perplexity"] = perplexity(model, self.windows, num_leading=len(self.leading))
        if self.questions:
            results |= evaluate_recall(model, self.tokenizer, self.questions, self.batch_size)
        if self.stress:
            stressed = positional_stress(
                model, self.sequences, filler=self.filler, batch_size=self.batch_size, leading=self.leading
            )
            results |= {
                f"{name}_shift_{shift:+d}": rate for shift, rates in stressed.items() for name, rate in rates.items()
            }
        return results
