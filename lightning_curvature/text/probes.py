"""Probes of a language model, read from JSON lines."""

import os
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lightning_curvature._checks import check_option
from lightning_curvature.storage.jsonl import read_jsonl
from lightning_curvature.text.corpus import token_windows
from lightning_curvature.text.decoding import context_length
from lightning_curvature.text.evaluation import WINDOW, evaluate_sequences, perplexity
from lightning_curvature.text.inner_model import find_language_model
from lightning_curvature.text.leading import leading_tokens
from lightning_curvature.text.models import load_tokenizer
from lightning_curvature.text.recall import Question, evaluate_recall, read_questions
from lightning_curvature.text.sequences import PromptedSequence, read_sequences

METRICS = {
    "prefix_ids": ("strict", "loose", "edit_distance", "extraction_strength", "min_k"),
    "answers": ("recall", "recall_open_book"),
    "text": ("perplexity",),
}
"""What is measured, by the field that tells the kind of a file."""


class JsonlProbe:
    """A file of recited sequences, questions, or text, and what to measure on it.

    Args:
        path: JSON lines with ``prefix_ids`` and ``suffix_ids``; with ``prompt`` and ``answers`` (and optionally
            ``context``); or with ``text``.
        metrics: Names of what to measure; by default all that this kind of file allows.
        tokenizer: A transformers tokenizer. Sequences need none: their prefixes are then taken as they stand in the
            file. With a tokenizer, prefixes begin with the tokens that it puts in front of a text.

    Raises:
        ValueError: If the file is of none of these kinds, a metric does not belong to its kind, or a tokenizer is
            missing.
    """

    def __init__(
        self, path: str | os.PathLike[str], metrics: Sequence[str] | None = None, tokenizer: Any = None
    ) -> None:
        first = next(read_jsonl(path))[1]
        kinds = [field for field in METRICS if field in first]
        if not kinds:
            raise ValueError(
                f"{path}, line 1: found the fields {sorted(first)}; a probe has prefix_ids and suffix_ids, prompt and "
                "answers, or text."
            )
        self.kind = kinds[0]
        self.metrics = tuple(
            check_option(m, METRICS[self.kind], f"A metric of {path}")
            for m in (METRICS[self.kind] if metrics is None else metrics)
        )
        self.tokenizer = tokenizer
        if tokenizer is None and self.kind != "prefix_ids":
            raise ValueError(
                f"{path} needs a tokenizer. Give the module or the datamodule an attribute `tokenizer`, or write "
                "{'path': ..., 'tokenizer': FOLDER}."
            )
        known = isinstance(tokenizer, PreTrainedTokenizerBase) or self.kind != "prefix_ids"
        self.leading = leading_tokens(tokenizer) if known else None
        self.sequences: list[PromptedSequence] = (
            read_sequences(path, leading=self.leading) if self.kind == "prefix_ids" else []
        )
        self.questions: list[Question] = read_questions(path) if self.kind == "answers" else []
        self.path = path

    def measure(self, module: nn.Module, layers: Collection[str] = ()) -> dict[str, float]:
        """Return the metrics of a causal LM, which may be inside a module; it should be in eval mode.

        Args:
            module: Holds the model.
            layers: Names of the edited layers: where the module holds several models, the model of these is meant.
        """
        model = find_language_model(module, layers)
        if self.kind == "prefix_ids":
            results = evaluate_sequences(model, self.sequences)
        elif self.kind == "answers":
            results = evaluate_recall(model, self.tokenizer, self.questions)
        else:
            length = min(WINDOW, context_length(model))
            windows = torch.tensor(list(token_windows(self.path, self.tokenizer, length)))
            results = {"perplexity": perplexity(model, windows, num_leading=len(self.leading or ()))}
        return {name: results[name] for name in self.metrics if name in results}


def make_probes(probes: dict[str, Any], tokenizer: Any) -> dict[str, JsonlProbe]:
    """Return probes by name.

    Args:
        probes: By name, the path of a file, or a dict with ``path`` and optionally ``metrics`` and ``tokenizer`` (a
            folder).
        tokenizer: The tokenizer of probes that name none.
    """
    made = {}
    for name, spec in probes.items():
        options = dict(spec) if isinstance(spec, dict) else {"path": spec}
        folder = options.pop("tokenizer", None)
        chosen = tokenizer if folder is None else load_tokenizer(folder)
        made[name] = JsonlProbe(options.pop("path"), tokenizer=chosen, **options)
    return made
