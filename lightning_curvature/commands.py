"""What each command of the command line does; the parser is made from the signatures and docstrings (cli.py)."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate

from lightning_curvature import files
from lightning_curvature.checkpoints.atomic import replacing
from lightning_curvature.checkpoints.outputs import check_outputs
from lightning_curvature.deltas import apply_delta
from lightning_curvature.demos.settings import TEXT, TextSettings
from lightning_curvature.editor import DEFAULT_ENERGY, CurvatureEditor
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.inspection import describe, description


class Output(NamedTuple):
    """What a command says: text for people, JSON values for ``--json``."""

    text: str
    data: Any


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say which extra to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"This command needs {error.name}: pip install 'lightning_curvature[{name}]'"
        ) from error  # fmt: skip


def digits(out: Path, seed: int = 0, epochs: int = 140) -> Output:
    """Train a small ViT on digits with 10 % wrong labels, edit it, and show what it forgot.

    Example:
        lightning-curvature demo digits --out runs/digits

    Args:
        out: Folder for checkpoints, factors, report and pictures.
        seed: Seed of the split, the noise and the training.
        epochs: Passes over the training images.
    """
    with _extra("demo"):
        from lightning_curvature.demos.digits import run_digits, summary
    report = run_digits(out, seed, epochs)
    return Output(f"\n{summary(report)}\nWritten to {out}", report)


def text(out: Path, seed: int = 0, compare: bool = False, settings: TextSettings = TEXT) -> Output:
    """Train a small OLMo-2 until it recites, edit it, and show what it forgot and what it kept.

    Example:
        lightning-curvature demo text --out runs/text --compare

    Args:
        out: Folder for checkpoints, factors, report, data files and pictures.
        seed: Seed of the data and the training.
        compare: Also measure the controls, at the same perplexity.
        settings: Sizes.
    """
    with _extra("demo"):
        from lightning_curvature.demos.text import run_text, summary
    report = run_text(out, seed, compare, settings)
    return Output(f"\n{summary(report)}\nWritten to {out}", report)


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
    accumulate_on: str = "model",
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
        accumulate_on: Where the factors are summed: model (the device of each layer) or cpu.
        save_every: Batches between two saves of the progress.
        seed: Seed of the random draws.
    """
    with _extra("text"):
        from lightning_curvature.text.collecting import collect_text
        from lightning_curvature.text.models import load_model, load_tokenizer
    factors = collect_text(
        load_model(model, checkpoint), load_tokenizer(model), corpus, out, layers=layers or ["last-mlp"],
        tokens=tokens, context=context, batch_size=batch_size, fisher=fisher, draws=draws, positions=positions,
        passes=passes, accumulate_on=accumulate_on, save_every=save_every, seed=seed,
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
    with _extra("text"):
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
    with _extra("text"):
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


def edit(
    checkpoint: Path,
    factors: Path,
    out: Path,
    energy: float | dict[str, float] = DEFAULT_ENERGY,
    layers: list[str] | None = None,
    dry_run: bool = False,
    save_delta: Path | None = None,
    to_hf: Path | None = None,
    overwrite: bool = False,
    allow_global: list[str] | None = None,
) -> Output:
    """Edit a saved checkpoint: a Hugging Face folder, .safetensors, Lightning .ckpt, or state dict .pt.

    Example:
        lightning-curvature edit --checkpoint MODEL --factors factors.safetensors --energy 0.6 --out EDITED

    Args:
        checkpoint: What to edit; it stays as it is.
        factors: Factor file of its model (.safetensors).
        out: File or folder to write, in the same format.
        energy: Share of the curvature mass to keep, in (0, 1], or a dict of layer patterns to shares.
        layers: fnmatch patterns on the layers of the factor file; by default all of them.
        dry_run: Print what would be done, and write nothing.
        save_delta: Also write a delta file, with which revert gets the original back.
        to_hf: Write a Hugging Face folder from a .ckpt or .pt whose module holds a Hugging Face model; names a folder
            with the model's config.json, from which the tokenizer and all other files are copied, too.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    inputs = [path for path in (checkpoint, factors, to_hf) if path is not None]
    check_outputs([path for path in (out, save_delta) if path is not None], inputs, overwrite)
    editor, loaded = CurvatureEditor(energy, layers), KroneckerFactors.open(factors)
    if dry_run:
        plan = files.plan_edit(editor, checkpoint, loaded, allow_global or ())
        return Output(str(plan), dataclasses.asdict(plan))
    report = files.edit_checkpoint(
        editor, checkpoint, loaded, out, overwrite=overwrite, delta=save_delta, allow_globals=allow_global or (),
        to_hf=to_hf,
    )  # fmt: skip
    shown = f"{report}\n{files.matches(report)}\nWritten to {out}"
    return Output(shown, {"out": str(out), **dataclasses.asdict(report)})


def revert(
    checkpoint: Path, delta: Path, out: Path, overwrite: bool = False, allow_global: list[str] | None = None
) -> Output:
    """Get the exact original of an edited checkpoint back, verified by hashes.

    Example:
        lightning-curvature revert --checkpoint EDITED --delta delta.safetensors --out ORIGINAL

    Args:
        checkpoint: The edited checkpoint.
        delta: File that edit wrote with --save-delta.
        out: File or folder to write.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    apply_delta(checkpoint, delta, out, revert=True, overwrite=overwrite, allow_globals=allow_global or ())
    return Output(f"The original is back at {out}", {"out": str(out)})


def apply(
    checkpoint: Path, delta: Path, out: Path, overwrite: bool = False, allow_global: list[str] | None = None
) -> Output:
    """Make the edit of a delta file on another copy of the original checkpoint.

    Example:
        lightning-curvature apply --checkpoint COPY --delta delta.safetensors --out EDITED

    Args:
        checkpoint: An unedited copy.
        delta: File that edit wrote with --save-delta.
        out: File or folder to write.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    apply_delta(checkpoint, delta, out, revert=False, overwrite=overwrite, allow_globals=allow_global or ())
    return Output(f"Written to {out}", {"out": str(out)})


def inspect(path: Path, allow_global: list[str] | None = None) -> Output:
    """Show what a factor file holds, or what was edited in a checkpoint.

    Example:
        lightning-curvature inspect factors.safetensors

    Args:
        path: Factor file, or checkpoint of any format.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    found = describe(path, allow_global or ())
    return Output(description(found), found)
