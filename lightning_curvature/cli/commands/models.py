"""Commands that run a saved language model: collect, mine, evaluate, sweep."""

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lightning_curvature._checks import check_energy, check_share
from lightning_curvature.cli.choices import AccumulateOn, Fisher, Half, Positions, Score
from lightning_curvature.cli.commands.inputs import (
    check_allowed,
    check_bases,
    check_counts,
    check_files,
    check_unused,
    read_factors,
)
from lightning_curvature.cli.commands.output import Output, extra
from lightning_curvature.storage.atomic import replacing


def collect(
    model: Path,
    corpus: Path,
    out: Path,
    layers: list[str] | None = None,
    tokens: int | None = None,
    context: int | None = None,
    batch_size: int = 4,
    checkpoint: Path | None = None,
    fisher: Fisher = "sketched",
    draws: int = 1,
    positions: Positions = "contributing",
    passes: int = 1,
    accumulate_on: AccumulateOn = "auto",
    share: float = 1.0,
    save_every: int = 50,
    seed: int = 0,
    overwrite: bool = False,
    allow_global: list[str] | None = None,
) -> Output:
    """Collect K-FAC factors of a saved Hugging Face causal LM over text; go on where an interrupted run stopped.

    Example:
        lightning-curvature collect --model MODEL --corpus text.jsonl --layers mlp --out factors.safetensors

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        corpus: Text file, or JSON lines (.jsonl) with a field "text".
        out: Factor file to write (.safetensors).
        layers: Presets (last-mlp, mlp, attention, linear) or fnmatch patterns on module names; by default last-mlp.
        tokens: Tokens to read at most.
        context: Tokens of a window, those that the tokenizer puts in front among them; by default 512, or what the
            model takes if that is less.
        batch_size: Windows per forward pass.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        fisher: Where the gradients come from: the model's own distribution, or (empirical) the data.
        draws: Backward passes per batch of sketched and sampled.
        positions: Positions that count.
        passes: Groups of layers, each with a pass of its own over the text, to save memory.
        accumulate_on: Where the factors are summed: model (the device of each layer), cpu, or auto (the device of each
            layer if they fit there).
        share: Share of the positions of each batch that is used, chosen at random.
        save_every: Batches between two saves of the progress.
        seed: Seed of the random draws.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    check_files(
        {"--out": out}, {"--corpus": corpus, "--checkpoint": _file(checkpoint)}, overwrite, models=[model, checkpoint]
    )
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(
        tokens=tokens, context=context, batch_size=batch_size, draws=draws, passes=passes, save_every=save_every
    )
    check_share(share, "--share")
    if draws > 1 and fisher in ("exact", "empirical"):
        check_unused(f"fisher {fisher} has no draws", draws=draws)
    with extra("text"):
        from lightning_curvature.text.collecting import WINDOW, collect_text
        from lightning_curvature.text.corpus import token_windows
        from lightning_curvature.text.saved import SavedModel
    saved = SavedModel(model, checkpoint, allowed)
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: factors are written to a safetensors file; give it a name that ends so.")
    context = saved.window(context, WINDOW)
    next(token_windows(corpus, saved.tokenizer, context, tokens))  # there is one
    saved.check_predicts(context)
    chosen = layers or ["last-mlp"]
    saved.check_layers(chosen)
    factors = collect_text(
        saved.load(),
        saved.tokenizer,
        corpus,
        out,
        layers=chosen,
        tokens=tokens,
        context=context,
        batch_size=batch_size,
        fisher=fisher,
        draws=draws,
        positions=positions,
        passes=passes,
        accumulate_on=accumulate_on,
        share=share,
        save_every=save_every,
        seed=seed,
    )
    rows = [
        [name, *f.shape, f.num_inputs, f"{1 - f.num_inputs / max(f.num_seen, 1):.1%}"] for name, f in factors.items()
    ]
    table = tabulate(rows, ["layer", "d_out", "d_in", "positions", "not counted"])
    layer_facts = {
        n: {"shape": f.shape, "num_inputs": f.num_inputs, "num_seen": f.num_seen} for n, f in factors.items()
    }
    return Output(f"{table}\nWritten to {out}", {"out": str(out), "layers": layer_facts})


def mine(
    model: Path,
    corpus: Path,
    out: Path,
    prefix: int = 64,
    suffix: int = 48,
    stride: int | None = None,
    windows: int = 10_000,
    similarity: float = 0.5,
    batch_size: int = 32,
    checkpoint: Path | None = None,
    seed: int = 0,
    overwrite: bool = False,
    allow_global: list[str] | None = None,
) -> Output:
    """Find windows of a text that a saved Hugging Face causal LM recites, and write them as JSON lines.

    Example:
        lightning-curvature mine --model MODEL --corpus text.jsonl --out recited.jsonl --prefix 32 --suffix 24

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        corpus: Text file, or JSON lines (.jsonl) with a field "text".
        out: File to write (.jsonl).
        prefix: Tokens of the text to prompt with, after those that the tokenizer puts in front.
        suffix: Tokens to recite.
        stride: Tokens between the starts of candidate windows; by default they do not overlap.
        windows: Candidates to test at most, a random sample.
        similarity: Of two recited windows that share this part of their tokens (as a common subsequence) one is kept.
        batch_size: Windows per forward pass.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        seed: Seed of the sample.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    check_files(
        {"--out": out}, {"--corpus": corpus, "--checkpoint": _file(checkpoint)}, overwrite, models=[model, checkpoint]
    )
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(prefix=prefix, suffix=suffix, stride=stride, windows=windows, batch_size=batch_size)
    check_share(similarity, "--similarity")
    with extra("text"):
        from lightning_curvature.text import mining
        from lightning_curvature.text.saved import SavedModel
        from lightning_curvature.text.sequences import HALVES, write_sequences
    saved = SavedModel(model, checkpoint, allowed)
    candidates = mining.candidates(
        saved.tokenizer, corpus, prefix=prefix, suffix=suffix, stride=stride, windows=windows, seed=seed
    )
    saved.check_fit(candidates)
    found = mining.mine_among(saved.load(), saved.tokenizer, candidates, similarity, batch_size)
    if not found:
        raise RuntimeError(
            "The model recites none of them; nothing was written. Try more windows, or shorter prefixes and suffixes."
        )
    write_sequences(out, found)
    counts = {half: sum(s.half == half for s in found) for half in HALVES}
    halves = ", ".join(f"{count} {half}" for half, count in counts.items())
    return Output(f"{len(found)} recited sequences ({halves}) written to {out}", {"out": str(out), "recited": counts})


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
    """Measure what a saved Hugging Face causal LM recites, knows and models, and what an edit changed.

    Example:
        lightning-curvature evaluate --model MODEL --checkpoint edited.ckpt --reference --sequences recited.jsonl

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        sequences: JSON lines with prefix_ids and suffix_ids, such as mine writes.
        half: Use this half of the sequences alone.
        corpus: Text file or JSON lines with a field "text", for perplexity and ranking overlap.
        recall: JSON lines with prompt, answers and optionally context, for recall of facts.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        reference: Measure the weights in the folder, too, as the model before the edit; needs --checkpoint.
        stress: Also ask for the sequences with prompts moved along them (positional stress test).
        tokens: Tokens of the corpus to read at most; by default 100000.
        context: Tokens of a window of the corpus, those that the tokenizer puts in front among them; by default 128, or
            what the model takes if that is less.
        batch_size: Sequences per forward pass.
        out: JSON file for the results.
        examples: Markdown file for continuations before and after, side by side; needs --reference and --sequences.
        overwrite: Replace what is at out and examples.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    inputs = {"--sequences": sequences, "--corpus": corpus, "--recall": recall, "--checkpoint": _file(checkpoint)}
    check_files({"--out": out, "--examples": examples}, inputs, overwrite, models=[model, checkpoint])
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(tokens=tokens, context=context, batch_size=batch_size)
    if sequences is None and corpus is None and recall is None:
        raise ValueError("Nothing to measure on: give at least one of --sequences, --corpus and --recall.")
    if stress and sequences is None:
        raise ValueError("The positional stress test needs sequences (--sequences).")
    if sequences is None:
        check_unused("it is about the sequences of --sequences", half=half)
    if corpus is None:
        check_unused("it is about the text of --corpus", tokens=tokens, context=context)
    if reference and checkpoint is None:
        raise ValueError("A reference is the model before an edit: name the edited checkpoint, too (--checkpoint).")
    if examples is not None and not (reference and sequences is not None):
        raise ValueError("Examples are continuations before and after: they need --reference and --sequences.")
    with extra("text"):
        from lightning_curvature.text.suite import Suite
    suite = Suite(
        model, sequences, half, corpus, recall, stress, tokens or 100_000, context, batch_size, checkpoint, allowed
    )
    results = suite.run(reference, examples)
    columns = list(results)
    names = list(dict.fromkeys(name for column in results.values() for name in column))
    body = [[name, *(results[column].get(name) for column in columns)] for name in names]
    table = tabulate(body, ["", *columns], floatfmt=".4f")
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(results, indent=2))
        table += f"\nWritten to {out}"
    return Output(table, results)


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
        sequences: JSON lines with prefix_ids and suffix_ids, such as mine writes.
        corpus: Text file or JSON lines with a field "text", for perplexity.
        out: Folder for sweep.csv and sweep.png; a sweep that is there goes on.
        half: Half of the sequences to measure on; report on the other one.
        energies: Shares to keep, in (0, 1]; by default ten from 0.7 to 0.99.
        layers: Choices of layers to compare, each one or several patterns with commas between; by default all layers.
        scores: Scores to compare; by default kfac.
        soft: Shrink what has a low score instead of dropping it.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window of the corpus, those that the tokenizer puts in front among them; by default 128, or
            what the model takes if that is less.
        batch_size: Sequences per forward pass.
        bases: Folder in which eigenbases are kept, so that edits with these factors need not work them out again.
        force: Use factors that were collected on other weights, such as those before a fine-tune.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    inputs = {
        "--factors": _file(factors),
        "--sequences": sequences,
        "--corpus": corpus,
        "--checkpoint": _file(checkpoint),
    }
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
            tokens=tokens,
            context=context,
            batch_size=batch_size,
            force=force,
        )
    front = pareto(rows, minimize=["strict", "perplexity"])
    plots.save(plots.pareto(rows, front, "perplexity", "strict"), out / "sweep.png")
    headers = {"edit": "edit", "energy": "energy", "strict": "strict", "times": "perplexity, times"}

    def shown(some: list[dict[str, Any]], **more: str) -> str:
        columns = {**more, **headers}
        return tabulate([[row[key] for key in columns] for row in some], [*columns.values()], floatfmt=".4g")

    text = f"Not beaten by another one:\n\n{shown(front)}\n\nLeast recited within a perplexity:\n\n"
    return Output(f"{text}{shown(best_within(rows), limit='limit')}\nWritten to {out}", {"out": str(out), "rows": rows})


def _file(path: Path | None) -> Path | None:
    """Return a path, unless it is a folder."""
    return None if path is None or path.is_dir() else path
