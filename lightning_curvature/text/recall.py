"""Questions with accepted answers: what a language model knows by heart, and what it can look up."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_curvature.metrics import RecallAccuracy
from lightning_curvature.storage.jsonl import read_jsonl
from lightning_curvature.text.decoding import NO_TOKEN, context_length, greedy_continuation
from lightning_curvature.text.leading import encode, leading_tokens


@dataclass(frozen=True)
class Question:
    """A prompt and its accepted answers.

    Args:
        prompt: What the model is asked, closed-book.
        answers: Accepted answers, at least one.
        context: Text that holds the answer; put before the prompt for an open-book question.
    """

    prompt: str
    answers: tuple[str, ...]
    context: str = ""


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """Read JSON lines with ``prompt`` (string), ``answers`` (list of strings) and optionally ``context`` (string).

    Raises:
        ValueError: If a line is not such a record; names the line.
    """
    questions = []
    for number, record in read_jsonl(path, ("prompt", "answers")):
        answers = record["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise ValueError(f"{path}, line {number}: answers must be a list of strings, found {answers!r:.60}.")
        if not str(record["prompt"]).strip():
            raise ValueError(f"{path}, line {number}: the prompt is empty; expected a question or the start of a text.")
        questions.append(Question(str(record["prompt"]), tuple(answers), str(record.get("context", ""))))
    return questions


def evaluate_recall(
    model: nn.Module, tokenizer: Any, questions: Sequence[Question], batch_size: int = 32, max_tokens: int = 24
) -> dict[str, float]:
    """Measure recall by greedy decoding.

    An answer ends with the line. Questions with a context are asked twice, with it (open-book) and without it
    (closed-book), so that both rates are about the same facts.

    Args:
        model: A transformers causal LM in eval mode.
        tokenizer: Its tokenizer.
        questions: What to ask.
        batch_size: Prompts per batch.
        max_tokens: Longest answer, in tokens.

    Returns:
        ``recall`` (closed-book), and ``recall_open_book`` where questions have a context; fractions in [0, 1].

    Raises:
        ValueError: If a prompt is too long for the model.
    """
    results = {}
    sets = {
        "recall": [(question.prompt, question.answers) for question in questions],
        "recall_open_book": [(q.context + q.prompt, q.answers) for q in questions if q.context],
    }
    for name, asked in sets.items():
        if asked:
            metric = RecallAccuracy()
            metric.update(
                answer(model, tokenizer, [prompt for prompt, _ in asked], batch_size, max_tokens),
                [answers for _, answers in asked],
            )
            results[name] = float(metric.compute())
    return results


def answer(model: nn.Module, tokenizer: Any, prompts: Sequence[str], batch_size: int, max_tokens: int) -> list[str]:
    """Return the first line of the greedy continuation of each prompt; arguments as :func:`evaluate_recall`."""
    answers: list[str] = [""] * len(prompts)
    # The tokens in front of a text alone: a prompt must not be closed by tokens that a tokenizer puts behind a text.
    leading = list(leading_tokens(tokenizer))
    ids = [leading + encode(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(ids[index]))
    device = next(model.parameters()).device
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = len(ids[indices[-1]])
        if longest + max_tokens > context_length(model):
            raise ValueError(
                f"A prompt has {longest} tokens and its answer up to {max_tokens}; the model's context is "
                f"{context_length(model)}. Shorten the prompt or its context."
            )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
        rows = torch.tensor([[pad] * (longest - len(ids[i])) + ids[i] for i in indices], device=device)
        mask = torch.tensor([[0] * (longest - len(ids[i])) + [1] * len(ids[i]) for i in indices], device=device)
        continued = greedy_continuation(model, rows, max_tokens, mask)
        for index, row in zip(indices, continued.tolist(), strict=True):
            text: str = tokenizer.decode([token for token in row if token != NO_TOKEN], skip_special_tokens=True)
            answers[index] = next(iter(text.strip().splitlines()), "")
    return answers
