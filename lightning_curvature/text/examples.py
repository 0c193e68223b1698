"""Continuations before and after an edit, side by side: people judge a language model by reading it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_curvature.storage.atomic import replacing
from lightning_curvature.text.decoding import NO_TOKEN, greedy_continuation
from lightning_curvature.text.sequences import PromptedSequence

Sections: TypeAlias = Mapping[str, Sequence[PromptedSequence]]
"""Sequences to continue, by the title of their section."""

Continued: TypeAlias = Mapping[str, Sequence[str]]
"""A continuation of each of these sequences as text, by the same titles."""


def continue_texts(
    model: nn.Module, tokenizer: Any, sequences: Sequence[PromptedSequence], length: int | None = None
) -> list[str]:
    """Return the greedy continuation of each prefix as text.

    Args:
        model: A transformers causal LM in eval mode.
        tokenizer: Its tokenizer.
        sequences: Prefixes and true suffixes.
        length: Tokens to decode; by default as many as the suffix has.
    """
    device = next(model.parameters()).device
    texts = []
    for sequence in sequences:
        prompt = torch.tensor([sequence.prefix_ids], device=device)
        continuation = greedy_continuation(model, prompt, length or len(sequence.suffix_ids))[0].tolist()
        texts.append(tokenizer.decode([token for token in continuation if token != NO_TOKEN]))
    return texts


def continue_sections(model: nn.Module, tokenizer: Any, sections: Sections) -> dict[str, list[str]]:
    """Return the continuations of :func:`continue_texts` by title."""
    return {title: continue_texts(model, tokenizer, sequences) for title, sequences in sections.items()}


def side_by_side(sections: Sections, before: Continued, after: Continued, tokenizer: Any) -> str:
    """Return a Markdown page of prompts, their true suffixes, and continuations before and after an edit.

    Args:
        sections: Prefixes and true suffixes.
        before: Continuations before the edit.
        after: Continuations after the edit.
        tokenizer: Decodes prefixes and suffixes.
    """
    lines = ["# Continuations before and after the edit"]
    for title, sequences in sections.items():
        lines += ["", f"## {title}"]
        for number, (sequence, old, new) in enumerate(zip(sequences, before[title], after[title], strict=True), 1):
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


def write_side_by_side(path: Path, sections: Sections, before: Continued, after: Continued, tokenizer: Any) -> None:
    """Write the page of :func:`side_by_side`, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(side_by_side(sections, before, after, tokenizer), encoding="utf-8")


def _line(text: str) -> str:
    """Return text on one line that Markdown shows as it is."""
    shown = text.replace("\n", " ⏎ ").replace("`", "'").replace("|", "¦")
    return f"`{shown}`"
