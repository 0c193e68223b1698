"""Commands on saved files: edit, revert, apply, inspect."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_curvature.cli.choices import Half, Score
from lightning_curvature.cli.commands.inputs import check_bases, check_counts
from lightning_curvature.cli.commands.output import Output, extra
from lightning_curvature.storage.outputs import check_outputs

if TYPE_CHECKING:
    from lightning_curvature.editing.curvature import CurvatureEditor
    from lightning_curvature.factors.kronecker import KroneckerFactors

_STRENGTH, _TOKENS = 0.4, 50_000


def edit(
    checkpoint: Path,
    factors: Path,
    out: Path,
    energy: float | dict[str, float] | None = None,
    layers: list[str] | None = None,
    score: Score = "kfac",
    soft: bool = False,
    min_positions: int | None = None,
    perplexity: float | None = None,
    corpus: Path | None = None,
    forget: Path | None = None,
    half: Half | None = None,
    strength: float | None = None,
    model: Path | None = None,
    tokens: int | None = None,
    context: int | None = None,
    dry_run: bool = False,
    save_delta: Path | None = None,
    to_hf: Path | None = None,
    bases: Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    force: bool = False,
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
        layers: fnmatch patterns on the layers of the factor file, or, where there is a model folder, presets (last-mlp,
            mlp, attention, linear); by default all of them.
        score: What decides what is kept: kfac, activations, saliency, or, if the factors have it, ekfac, coupled.
        soft: Shrink what has a low score instead of dropping it.
        min_positions: Positions that the factors of a layer must rest on, or it is left as it is; by default as many as
            its live inputs and outputs; 0 edits it whatever they rest on.
        perplexity: Instead of an energy: find the strongest edit that raises the perplexity of --corpus to at most this
            multiple, 1.1 for example, on one half of its windows; what it costs on the other half is printed.
        corpus: Text file, or JSON lines with a field "text", for --perplexity.
        forget: JSON lines with prefix_ids and suffix_ids, such as mine writes: make a bulk step against reciting them
            before the edit.
        half: Use the tuning or the validation half of the sequences of --forget alone.
        strength: Length of the step of --forget, relative to each weight; by default 0.4.
        model: Folder of the Hugging Face model whose weights the checkpoint holds, for --perplexity, --forget and
            presets of --layers; by default the checkpoint itself.
        tokens: Tokens of the corpus to read at most; by default 50000.
        context: Tokens of a window of the corpus, those that the tokenizer puts in front among them; by default 128, or
            what the model takes if that is less.
        dry_run: Print what would be done, and write nothing.
        save_delta: Also write a delta file, with which revert gets the original back.
        to_hf: Write a Hugging Face folder from a .ckpt or .pt whose module holds a Hugging Face model; names a folder
            with the model's config.json, from which the tokenizer and all other files are copied, too.
        bases: Folder in which eigenbases are kept, so that other edits with these factors need not work them out again.
        device: Where layers are edited, one at a time: auto (the GPU if there is one), cpu, cuda, cuda:1 ...
        overwrite: Replace what is at out.
        force: Edit weights that are not those that the factors were collected on, such as those of a fine-tune.
        allow_global: Classes that a .ckpt or .pt may hold beside tensors and primitives; only of files that you trust.
    """
    from lightning_curvature.editing import streaming as files
    from lightning_curvature.editing.base import DEFAULT_ENERGY
    from lightning_curvature.editing.curvature import CurvatureEditor
    from lightning_curvature.factors.basis_cache import bases_in
    from lightning_curvature.factors.kronecker import KroneckerFactors

    options = {
        "corpus": corpus,
        "forget": forget,
        "half": half,
        "strength": strength,
        "model": model,
        "tokens": tokens,
        "context": context,
    }
    if model not in (None, checkpoint) and checkpoint.is_dir():
        raise ValueError(f"{checkpoint} is a folder with a model of its own: leave --model out.")
    check_counts(tokens=tokens, context=context)
    _check_used(options, perplexity, layers)
    if dry_run and save_delta is not None:
        raise ValueError("--dry-run writes nothing: leave --save-delta out.")
    if perplexity is not None and energy is not None:
        raise ValueError("--perplexity finds the energy, one for all layers: give no --energy.")
    check_bases(bases, [checkpoint, to_hf, model])
    allowed = allow_global or ()
    found = files.open_to_edit(checkpoint, out, overwrite, save_delta, allowed, to_hf)
    if allowed and found.format != "archive":
        raise ValueError(f"--allow-global is for files of torch.save; {checkpoint} is none.")
    loaded = KroneckerFactors.open(factors)
    read = [path for path in (factors, corpus, forget, bases) if path is not None]
    check_outputs([path for path in (out, save_delta) if path is not None], read, overwrite)
    folder = next((path for path in (checkpoint, to_hf, model) if path is not None and path.is_dir()), None)
    share = DEFAULT_ENERGY if energy is None else energy
    editor = CurvatureEditor(share, named_layers(layers, loaded, folder), score, soft, min_positions=min_positions)
    target: dict[str, Any] = {}
    with bases_in(bases, write=not dry_run):
        if perplexity is not None or forget is not None:
            if not force:
                files.check_origin(editor, checkpoint, loaded, allowed)  # before a model is loaded and run
            editor, loaded, target = _chosen(editor, checkpoint, loaded, perplexity, options, allowed)
        said = f"{target['text']}\n" if target else ""
        told = {"target": target} if target else {}
        if dry_run:
            plan = files.plan_edit(editor, checkpoint, loaded, allowed, device, force)
            return Output(f"{said}{plan}", {**dataclasses.asdict(plan), **told})
        report = files.edit_checkpoint(
            editor,
            checkpoint,
            loaded,
            out,
            overwrite=overwrite,
            delta=save_delta,
            allow_globals=allowed,
            to_hf=to_hf,
            device=device,
            force=force,
        )
    shown = f"{said}{report}\n{files.matches(report)}\nWritten to {out}"
    return Output(shown, {"out": str(out), **dataclasses.asdict(report), **told})


def _check_used(options: Mapping[str, Any], perplexity: float | None, layers: list[str] | None) -> None:
    """Raise ``ValueError`` if an option would be ignored, or names no file."""
    from lightning_curvature.layers.selection import PRESETS

    given = {name for name, value in options.items() if value is not None}
    users = {
        "--perplexity": (perplexity is not None, {"corpus", "tokens", "context", "model"}),
        "--forget": ("forget" in given, {"half", "strength", "model"}),
        "a preset of --layers": (bool(set(layers or ()) & set(PRESETS)), {"model"}),
    }
    for name in sorted(given - {"forget"}):
        takers = {user: active for user, (active, takes) in users.items() if name in takes}
        if not any(takers.values()):
            remedy = (
                "Leave it out, or say what the edit may cost: --perplexity."
                if "--perplexity" in takers
                else "Leave it out."
            )
            raise ValueError(f"--{name} is used by {' and '.join(takers)} alone, which is not given. {remedy}")
    if perplexity is not None and "corpus" not in given:
        raise ValueError("--perplexity needs a text to measure it on: --corpus.")
    if perplexity is not None and not 1 < perplexity < float("inf"):
        raise ValueError(f"The perplexity may become a multiple above 1 of what it was, found {perplexity!r}.")
    for name in ("corpus", "forget"):
        if name in given and not options[name].is_file():
            raise FileNotFoundError(f"--{name}: {options[name]} is no file.")
    if "model" in given and not options["model"].is_dir():
        raise FileNotFoundError(f"--model: {options['model']} is no folder; name one written by save_pretrained.")


def _chosen(
    editor: "CurvatureEditor",
    checkpoint: Path,
    factors: "KroneckerFactors",
    perplexity: float | None,
    options: Mapping[str, Any],
    allowed: Sequence[str],
) -> tuple["CurvatureEditor", "KroneckerFactors", dict[str, Any]]:
    """Return the editor, the factors, and how the energy was found, where the model has to run for it."""
    with extra("text"):
        from lightning_curvature.text.choosing import Chooser
    from lightning_curvature.editing.bulk import BulkStepEditor
    from lightning_curvature.factors.kronecker import KroneckerFactors

    model = options["model"]
    weights = None if model in (None, checkpoint) else checkpoint
    chooser = Chooser(model or checkpoint, weights, factors, allowed)
    tokens, context = options["tokens"] or _TOKENS, options["context"]
    chooser.check_data(options["forget"], options["half"], options["corpus"], tokens, context)
    names = chooser.names.items()
    factors = KroneckerFactors({own: chooser.factors[name] for own, name in names}, factors.provenance)  # read once
    if options["forget"] is not None:
        factors = chooser.add_margins(options["forget"], options["half"])
        strength = _STRENGTH if options["strength"] is None else options["strength"]
        editor = BulkStepEditor(
            strength, editor.energy, editor.layers, editor.score, editor.soft, min_positions=editor.min_positions
        )
    if perplexity is None:
        return editor, factors, {}
    target = chooser.find(editor, perplexity, options["corpus"], tokens, context)
    return editor.at(target["energy"]), factors, target


def named_layers(layers: list[str] | None, factors: "KroneckerFactors", folder: Path | None) -> list[str] | None:
    """Return the layers of factors that presets stand for, and patterns as they are.

    Args:
        layers: Presets and patterns; None for all.
        factors: The factors; the order of their layers is the one in which they ran.
        folder: Folder of the model, which tells a preset's layers.

    Raises:
        ValueError: If there is a preset and no model, or it takes no layer of the factors.
    """
    from lightning_curvature._checks import listing
    from lightning_curvature.checkpoints.empty_model import empty_model, fill
    from lightning_curvature.checkpoints.names import match_layers
    from lightning_curvature.layers.selection import PRESETS, choose_layers

    presets = [entry for entry in layers or () if entry in PRESETS]
    if not presets or layers is None:
        return layers
    with extra("text"):
        module = None if folder is None else empty_model(folder)
    if module is None:
        raise ValueError(
            f"--layers {' '.join(presets)}: presets need a model folder, with the config.json of a model of "
            "transformers (--model). Or name patterns on the layers of the factors."
        )
    fill(module)
    modules = dict(module.named_modules())
    names = match_layers(factors, (f"{name}.weight" for name in modules))
    head = module.get_output_embeddings()
    heads = {name for name, layer in modules.items() if layer is head}
    chosen = [entry for entry in layers if entry not in PRESETS]
    for preset in presets:
        pools = choose_layers(module, preset).pools[preset]
        pool = next((pool - heads for pool in pools if pool - heads), frozenset[str]())
        if preset == "last-mlp":
            pool = frozenset([name for name in modules if name in pool][-1:])
        held = [layer for layer, name in names.items() if name.removesuffix(".weight") in pool]
        if not held:
            raise ValueError(
                f"--layers {preset}: the factors hold none of its layers, {listing(sorted(pool), 4)}, but "
                f"{listing(factors, 4)}."
            )
        chosen += [layer for layer in held if layer not in chosen]
    return chosen


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
    from lightning_curvature.checkpoints.deltas import apply_delta

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
    from lightning_curvature.checkpoints.deltas import apply_delta

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
    from lightning_curvature.report.inspection import describe, description

    found = describe(path, allow_global or ())
    return Output(description(found), found)
