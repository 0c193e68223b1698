"""The command ``sweep``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lightning_curvature._checks import check_energy
from lightning_curvature.cli.choices import Half, Scope, Score
from lightning_curvature.cli.commands.inputs import (
    check_allowed,
    check_bases,
    check_counts,
    check_files,
    read_factors,
    unless_folder,
)
from lightning_curvature.cli.commands.output import Output, extra


def sweep(
    model: Path,
    factors: Path,
    sequences: Path,
    corpus: Path,
    out: Path,
    half: Half | None = "tuning",
    energies: list[float] | None = None,
    layers: list[str] | None = None,
    scores: list[Score] | None = None,
    soft: bool = False,
    scope: Scope | None = None,
    checkpoint: Path | None = None,
    tokens: int = 20_000,
    context: int | None = None,
    batch_size: int = 32,
    bases: Path | None = None,
    force: bool = False,
    allow_global: list[str] | None = None,
) -> Output:
    """Edit a saved Hugging Face causal LM in many ways, and show what each leaves and costs; resumable.

    Example:
        lightning-curvature sweep --model DIR --factors F.safetensors --sequences S.jsonl --corpus C.jsonl --out sweep

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        factors: Factor file of the model (.safetensors).
        sequences: JSON lines with prefix_ids and suffix_ids, as the command "mine" writes them.
        corpus: Text file or JSON lines with a field "text", for perplexity.
        out: Folder for sweep.csv and sweep.png; a sweep that is there goes on.
        half: Half of the sequences to measure on; report on the other one.
        energies: Shares to keep, in (0, 1]; by default ten from 0.7 to 0.99.
        layers: Choices of layers to compare, each one or several patterns with commas between; by default all layers.
        scores: Scores to compare; by default kfac.
        soft: Shrink what has a low score instead of dropping it.
        scope: Compare scores within each layer, as by default, or over the layers of the whole model.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window of the corpus, those that the tokenizer puts in front among them; by default 128, or
            what the model takes if that is less.
        batch_size: Sequences per forward pass.
        bases: Folder in which eigenbases are kept, so that edits with these factors need not work them out again.
        force: Use factors that were collected on other weights, such as those before a fine-tune.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    inputs = {"--factors": unless_folder(factors), "--sequences": sequences, "--corpus": corpus}
    inputs |= {"--checkpoint": unless_folder(checkpoint)}
    check_files({"--out": out}, inputs, overwrite=True, folders=True, models=[model, checkpoint])
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(tokens=tokens, context=context, batch_size=batch_size)
    check_bases(bases, [model, checkpoint])
    for energy in energies or ():
        check_energy(energy, "--energies")
    if any(not pattern.strip() for choice in layers or () for pattern in choice.split(",")):
        raise ValueError(f"--layers {' '.join(layers or ())}: a choice is one or several patterns with commas between.")
    with extra("text"):
        from lightning_curvature.text.choosing import ENERGIES, Chooser, best_within
    with extra("plots"):
        from lightning_curvature.report import plots
    from lightning_curvature.factors.basis_cache import bases_in
    from lightning_curvature.search.sweep import pareto

    with bases_in(bases):
        rows = Chooser(model, checkpoint, read_factors(factors), allowed).sweep(
            out / "sweep.csv",
            sequences,
            half,
            corpus,
            energies=energies or ENERGIES,
            layers=layers,
            scores=scores or ["kfac"],
            soft=soft,
            scope=scope,
            tokens=tokens,
            context=context,
            batch_size=batch_size,
            force=force,
        )
    front = pareto(rows, minimize=["strict", "perplexity"])
    plots.save(plots.pareto(rows, front, "perplexity", "strict"), out / "sweep.png")
    text = f"Not beaten by another one:\n\n{_table(front)}\n\nLeast recited within a perplexity:\n\n"
    best = _table(best_within(rows), limit="limit")
    return Output(f"{text}{best}\nWritten to {out}", {"out": str(out), "rows": rows})


def _table(rows: Sequence[dict[str, Any]], **columns: str) -> str:
    """Return rows of a sweep as text; ``columns`` are titles of more columns, in front, by key."""
    columns |= {"edit": "edit", "energy": "energy", "strict": "strict", "times": "perplexity, times"}
    return tabulate([[row[key] for key in columns] for row in rows], [*columns.values()], floatfmt=".4g")
