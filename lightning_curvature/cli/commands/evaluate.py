"""The command ``evaluate``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lightning_curvature.cli.choices import Half
from lightning_curvature.cli.commands.inputs import (
    check_allowed,
    check_counts,
    check_files,
    check_unused,
    unless_folder,
)
from lightning_curvature.cli.commands.output import Output, extra
from lightning_curvature.storage.atomic import replacing


def evaluate(
    model: Path,
    sequences: Path | None = None,
    half: Half | None = None,
    corpus: Path | None = None,
    recall: Path | None = None,
    checkpoint: Path | None = None,
    reference: bool = False,
    stress: bool = False,
    tokens: int | None = None,
    context: int | None = None,
    batch_size: int = 32,
    out: Path | None = None,
    examples: Path | None = None,
    overwrite: bool = False,
    allow_global: list[str] | None = None,
) -> Output:
    """Measure recitation, recall of facts and perplexity of a saved Hugging Face causal LM, and what an edit changed.

    Example:
        lightning-curvature evaluate --model MODEL --checkpoint edited.ckpt --reference --sequences recited.jsonl

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        sequences: JSON lines with prefix_ids and suffix_ids, as the command "mine" writes them.
        half: Use only this half of the sequences.
        corpus: Text file or JSON lines with a field "text", for perplexity and ranking overlap.
        recall: JSON lines with prompt, answers and optionally context, for recall of facts.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        reference: Also measure the weights in the model folder, as the model before the edit; needs --checkpoint.
        stress: Also prompt with prefixes extended to the left or shifted to the right (positional stress test).
        tokens: Tokens of the corpus to read at most; by default 100000.
        context: Tokens of a window of the corpus, those that the tokenizer puts in front among them; by default 128, or
            what the model takes if that is less.
        batch_size: Sequences per forward pass.
        out: JSON file for the results.
        examples: Markdown file for continuations before and after the edit, side by side; needs --reference and
            --sequences.
        overwrite: Replace what is at out and examples.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    inputs = {"--sequences": sequences, "--corpus": corpus, "--recall": recall}
    inputs |= {"--checkpoint": unless_folder(checkpoint)}
    check_files({"--out": out, "--examples": examples}, inputs, overwrite, models=[model, checkpoint])
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(tokens=tokens, context=context, batch_size=batch_size)
    if sequences is None and corpus is None and recall is None:
        raise ValueError("Nothing to measure on: give at least one of --sequences, --corpus and --recall.")
    if stress and sequences is None:
        raise ValueError("The positional stress test needs sequences (--sequences).")
    if sequences is None:
        check_unused("there is no --sequences", half=half)
    if corpus is None:
        check_unused("there is no --corpus", tokens=tokens, context=context)
    if reference and checkpoint is None:
        raise ValueError("--reference measures the model before an edit: name the edited checkpoint (--checkpoint).")
    if examples is not None and not (reference and sequences is not None):
        raise ValueError("--examples shows text before and after an edit: it needs --reference and --sequences.")
    with extra("text"):
        from lightning_curvature.text.suite import Suite
    suite = Suite(
        model, sequences, half, corpus, recall, stress, tokens or 100_000, context, batch_size, checkpoint, allowed
    )
    results = suite.run(reference, examples)
    if out is None:
        return Output(_table(results), results)
    with replacing(out) as temporary:
        temporary.write_text(json.dumps(results, indent=2))
    return Output(f"{_table(results)}\nWritten to {out}", results)


def _table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return metrics as text, with a column for each model that was measured."""
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    rows = [[name, *(metrics.get(name) for metrics in results.values())] for name in names]
    return tabulate(rows, ["", *results], floatfmt=".4f")
