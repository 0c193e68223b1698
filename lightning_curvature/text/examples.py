"""Continuations before and after an edit, side by side: people judge a language model by reading it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_curvature.text.decoding import NO_TOKEN, greedy_continuation
from lightning_curvature.text.sequences import PromptedSequence


def continue_texts(
    model: nn.Module, tokenizer: Any, sequences: Sequence[PromptedSequence], length: int | None = None
) -> list[str]:
    """Return the greedy continuation of each prefix as text, by default as long as the suffix."""
    device = next(model.parameters()).device
    texts = []
    for sequence in sequences:
        prompt = torch.tensor([sequence.prefix_ids], device=device)
        new = greedy_continuation(model, prompt, length or len(sequence.suffix_ids))[0].tolist()
        texts.append(tokenizer.decode([token for token in new if token != NO_TOKEN]))
    return texts


def side_by_side(
    titled: dict[str, tuple[Sequence[PromptedSequence], Sequence[str], Sequence[str]]], tokenizer: Any
) -> str:
    """Return a Markdown page of prompts, their true suffixes, and continuations before and after an edit.

    Args:
        titled: By section title: sequences, continuations before, continuations after.
        tokenizer: Decodes prefixes and suffixes.
    """
    lines = ["# Continuations before and after the edit"]
    for title, (sequences, before, after) in titled.items():
        lines += ["", f"## {title}"]
        for number, (sequence, old, new) in enumerate(zip(sequences, before, after, strict=True), 1):
            true = tokenizer.decode(sequence.suffix_ids)
            lines += [
                "",
                f"### {number}. {_line(tokenizer.decode(sequence.prefix_ids[sequence.num_leading :]))}",
                "",
                "| | |",
                "|---|---|",
            ]
            for label, text in (("true", true), ("before", old), ("after", new)):
                recited = " (recited)" if label != "true" and text == true else ""
                lines.append(f"| {label}{recited} | {_line(text)} |")
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """Return text on one line that Markdown shows as it is."""
    shown = text.replace("\n", " ⏎ ").replace("`", "'").replace("|", "¦")
    return f"`{shown}`"
