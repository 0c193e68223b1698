"""Commands on saved files: edit, revert, apply, inspect."""

import dataclasses
from pathlib import Path
from typing import Any

from lightning_curvature import files
from lightning_curvature.bases import bases_in
from lightning_curvature.bulk import BulkStepEditor
from lightning_curvature.checkpoints.outputs import check_outputs
from lightning_curvature.commands.output import Output, extra
from lightning_curvature.deltas import apply_delta
from lightning_curvature.editing import DEFAULT_ENERGY
from lightning_curvature.editor import CurvatureEditor
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.inspection import describe, description


def edit(
    checkpoint: Path,
    factors: Path,
    out: Path,
    energy: float | dict[str, float] | None = None,
    layers: list[str] | None = None,
    score: str = "kfac",
    soft: bool = False,
    perplexity: float | None = None,
    corpus: Path | None = None,
    forget: Path | None = None,
    half: str | None = None,
    strength: float = 0.4,
    model: Path | None = None,
    tokens: int = 50_000,
    context: int = 128,
    dry_run: bool = False,
    save_delta: Path | None = None,
    to_hf: Path | None = None,
    bases: Path | None = None,
    device: str = "auto",
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
        energy: Share of the curvature mass to keep, in (0, 1], or a dict of layer patterns to shares; by default 0.85.
        layers: fnmatch patterns on the layers of the factor file; by default all of them.
        score: What decides what is kept: kfac, activations, saliency, or, if the factors have it, ekfac, coupled.
        soft: Shrink what has a low score instead of dropping it.
        perplexity: Instead of an energy: find the strongest edit that raises the perplexity of --corpus to at most this
            multiple, 1.1 for example, on one half of its windows; what it costs on the other half is printed.
        corpus: Text file, or JSON lines with a field "text", for --perplexity.
        forget: JSON lines with prefix_ids and suffix_ids, such as mine writes: make a bulk step against reciting them
            before the edit.
        half: Use the tuning or the validation half of these sequences alone.
        strength: Length of that step, relative to each weight.
        model: Folder of the Hugging Face model whose weights the checkpoint holds, for --perplexity and --forget; by
            default the checkpoint itself.
        tokens: Tokens of the corpus to read at most.
        context: Tokens of a window of the corpus.
        dry_run: Print what would be done, and write nothing.
        save_delta: Also write a delta file, with which revert gets the original back.
        to_hf: Write a Hugging Face folder from a .ckpt or .pt whose module holds a Hugging Face model; names a folder
            with the model's config.json, from which the tokenizer and all other files are copied, too.
        bases: Folder in which eigenbases are kept, so that other edits with these factors need not work them out again.
        device: Where layers are edited, one at a time: auto (the GPU if there is one), cpu, cuda, cuda:1 ...
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    inputs = [path for path in (checkpoint, factors, to_hf) if path is not None]
    check_outputs([path for path in (out, save_delta) if path is not None], inputs, overwrite)
    share = DEFAULT_ENERGY if energy is None else energy
    editor, loaded = CurvatureEditor(share, layers, score, soft), KroneckerFactors.open(factors)
    with bases_in(bases):
        found: dict[str, Any] = {}
        if perplexity is not None or forget is not None:
            with extra("text"):
                from lightning_curvature.text.choosing import Chooser
            weights = None if model in (None, checkpoint) else checkpoint
            if weights is not None and weights.is_dir():
                raise ValueError(f"{weights} is a folder with a model of its own: leave --model out.")
            chooser = Chooser(model or checkpoint, weights, loaded, allow_global or ())
            if forget is not None:
                loaded = chooser.add_margins(forget, half)
                editor = BulkStepEditor(strength, share, layers, score, soft)
            if perplexity is not None:
                if energy is not None:
                    raise ValueError("--perplexity finds the energy, one for all layers: give no --energy.")
                if corpus is None:
                    raise ValueError("--perplexity needs a text to measure it on: --corpus.")
                found = chooser.find(editor, perplexity, corpus, tokens, context)
                editor = editor.at(found["energy"])
        elif corpus is not None:
            raise ValueError("--corpus is a text to choose an energy on: say what the edit may cost with --perplexity.")
        said = f"{found['text']}\n" if found else ""
        if dry_run:
            plan = files.plan_edit(editor, checkpoint, loaded, allow_global or (), device)
            return Output(f"{said}{plan}", {**dataclasses.asdict(plan), **({"target": found} if found else {})})
        report = files.edit_checkpoint(
            editor, checkpoint, loaded, out, overwrite=overwrite, delta=save_delta, allow_globals=allow_global or (),
            to_hf=to_hf, device=device,
        )  # fmt: skip
        shown = f"{said}{report}\n{files.matches(report)}\nWritten to {out}"
        return Output(shown, {"out": str(out), **dataclasses.asdict(report), **({"target": found} if found else {})})


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
