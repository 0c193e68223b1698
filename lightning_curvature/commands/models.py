"""Commands that run a saved language model: collect, mine, evaluate, sweep."""

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lightning_curvature.bases import bases_in
from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.commands.output import Output, extra
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.sweep import pareto


def collect(
    model: Path,
    corpus: Path,
    out: Path,
    layers: list[str] | None = None,
    tokens: int | None = None,
    context: int = 512,
    batch_size: int = 4,
    checkpoint: Path | None = None,
    fisher: str = "sketched",
    draws: int = 1,
    positions: str = "contributing",
    passes: int = 1,
    accumulate_on: str = "auto",
    share: float = 1.0,
    save_every: int = 50,
    seed: int = 0,
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
        context: Tokens of a window.
        batch_size: Windows per forward pass.
        checkpoint: Take the weights from this checkpoint (.ckpt, .pt, .safetensors) instead.
        fisher: sketched, sampled, exact or empirical.
        draws: Backward passes per batch of sketched and sampled.
        positions: contributing, all or first.
        passes: Groups of layers, each with a pass of its own over the text, to save memory.
        accumulate_on: Where the factors are summed: model (the device of each layer), cpu, or auto (the device of each
            layer if they fit there).
        share: Share of the positions of each batch that is used, chosen at random.
        save_every: Batches between two saves of the progress.
        seed: Seed of the random draws.
    """
    with extra("text"):
        from lightning_curvature.text.collecting import collect_text
        from lightning_curvature.text.models import load_model, load_tokenizer
    factors = collect_text(
        load_model(model, checkpoint), load_tokenizer(model), corpus, out, layers=layers or ["last-mlp"],
        tokens=tokens, context=context, batch_size=batch_size, fisher=fisher, draws=draws, positions=positions,
        passes=passes, accumulate_on=accumulate_on, share=share, save_every=save_every, seed=seed,
    )  # fmt: skip
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
) -> Output:
    """Find windows of a text that a saved Hugging Face causal LM recites, and write them as JSON lines.

    Example:
        lightning-curvature mine --model MODEL --corpus text.jsonl --out recited.jsonl --prefix 32 --suffix 24

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        corpus: Text file, or JSON lines (.jsonl) with a field "text".
        out: File to write (.jsonl).
        prefix: Tokens to prompt with.
        suffix: Tokens to recite.
        stride: Tokens between the starts of candidate windows; by default they do not overlap.
        windows: Candidates to test at most, a random sample.
        similarity: Of two recited windows that share this part of their tokens (as a common subsequence) one is kept.
        batch_size: Windows per forward pass.
        checkpoint: Take the weights from this checkpoint (.ckpt, .pt, .safetensors) instead.
        seed: Seed of the sample.
    """
    with extra("text"):
        from lightning_curvature.text import mining
        from lightning_curvature.text.models import check_vocabulary, load_model, load_tokenizer
        from lightning_curvature.text.sequences import HALVES, write_sequences
    network, tokenizer = load_model(model, checkpoint), load_tokenizer(model)
    check_vocabulary(network, tokenizer)
    found = mining.mine(
        network, tokenizer, corpus, prefix=prefix, suffix=suffix, stride=stride, windows=windows,
        similarity=similarity, batch_size=batch_size, seed=seed,
    )  # fmt: skip
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
    half: str | None = None,
    corpus: Path | None = None,
    recall: Path | None = None,
    checkpoint: Path | None = None,
    reference: bool = False,
    stress: bool = False,
    tokens: int = 100_000,
    context: int = 128,
    batch_size: int = 32,
    out: Path | None = None,
    examples: Path | None = None,
) -> Output:
    """Measure what a saved Hugging Face causal LM recites, knows and models, and what an edit changed.

    Example:
        lightning-curvature evaluate --model MODEL --checkpoint edited.ckpt --reference --sequences recited.jsonl

    Args:
        model: Folder written by save_pretrained, with its tokenizer.
        sequences: JSON lines with prefix_ids and suffix_ids, such as mine writes.
        half: Use the tuning or the validation half of the sequences alone.
        corpus: Text file or JSON lines with a field "text", for perplexity and ranking overlap.
        recall: JSON lines with prompt, answers and optionally context, for recall of facts.
        checkpoint: Take the weights from this checkpoint (.ckpt, .pt, .safetensors) instead.
        reference: Measure the weights in the folder, too, as the model before the edit; needs --checkpoint.
        stress: Also ask for the sequences with prompts moved along them (positional stress test).
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window of the corpus.
        batch_size: Sequences per forward pass.
        out: JSON file for the results.
        examples: Markdown file for continuations before and after, side by side; needs --reference and --sequences.
    """
    with extra("text"):
        from lightning_curvature.text.suite import Suite, write_examples
    suite = Suite(model, sequences, half, corpus, recall, stress, tokens, context, batch_size)
    if examples is not None:
        write_examples(suite, checkpoint, reference, examples)
    results = suite.run(checkpoint, reference)
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
    half: str | None = "tuning",
    energies: list[str] | None = None,
    layers: list[str] | None = None,
    scores: list[str] | None = None,
    soft: bool = False,
    checkpoint: Path | None = None,
    tokens: int = 20_000,
    context: int = 128,
    batch_size: int = 32,
    bases: Path | None = None,
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
        scores: Scores to compare, such as kfac and activations; by default kfac.
        soft: Shrink what has a low score instead of dropping it.
        checkpoint: Take the weights from this checkpoint (.ckpt, .pt, .safetensors) instead.
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window of the corpus.
        batch_size: Sequences per forward pass.
        bases: Folder in which eigenbases are kept, so that edits with these factors need not work them out again.
    """
    with extra("text"):
        from lightning_curvature.text.choosing import ENERGIES, Chooser, best_within
    with extra("plots"):
        from lightning_curvature import plots
    chosen = ENERGIES if energies is None else [float(energy) for energy in energies]
    with bases_in(bases):
        rows = Chooser(model, checkpoint, KroneckerFactors.load(factors)).sweep(
            out / "sweep.csv", sequences, half, corpus, energies=chosen, layers=layers, scores=scores or ["kfac"],
            soft=soft, tokens=tokens, context=context, batch_size=batch_size,
        )  # fmt: skip
    front = pareto(rows, minimize=["strict", "perplexity"])
    plots.save(plots.pareto(rows, front, "perplexity", "strict"), out / "sweep.png")
    headers = {"edit": "edit", "energy": "energy", "strict": "strict", "times": "perplexity, times"}

    def shown(some: list[dict[str, Any]], **more: str) -> str:
        columns = {**more, **headers}
        return tabulate([[row[key] for key in columns] for row in some], [*columns.values()], floatfmt=".4g")

    text = f"Not beaten by another one:\n\n{shown(front)}\n\nLeast recited within a perplexity:\n\n"
    return Output(f"{text}{shown(best_within(rows), limit='limit')}\nWritten to {out}", {"out": str(out), "rows": rows})
