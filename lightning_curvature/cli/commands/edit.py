"""The command ``edit``."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_curvature.cli.choices import Half, Scope, Score
from lightning_curvature.cli.commands.edit_options import check_options, edit_on_data
from lightning_curvature.cli.commands.inputs import check_bases
from lightning_curvature.cli.commands.output import Output
from lightning_curvature.cli.commands.presets import named_layers
from lightning_curvature.storage.outputs import check_outputs

if TYPE_CHECKING:
    from lightning_curvature.editing.curvature import CurvatureEditor


def edit(
    checkpoint: Path,
    factors: Path,
    out: Path,
    energy: float | dict[str, float] | None = None,
    budget: float | None = None,
    reference: Path | None = None,
    scale: float = 1.0,
    layers: list[str] | None = None,
    score: Score = "kfac",
    soft: bool = False,
    scope: Scope | None = None,
    min_positions: int | None = None,
    perplexity: float | None = None,
    corpus: list[Path] | None = None,
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
    """Edit a saved checkpoint: a Hugging Face folder, LoRA adapter, .safetensors, Lightning .ckpt, or state dict .pt.

    Example:
        lightning-curvature edit --checkpoint MODEL --factors factors.safetensors --energy 0.6 --out EDITED

    Args:
        checkpoint: What to edit; it stays as it is. Of a peft model name the folder of the adapter, which is the update
            since its base: the factors may be those of the base.
        factors: Factor file of its model (.safetensors).
        out: File or folder to write, in the same format.
        energy: Share of the curvature mass to keep, in (0, 1], or a dict of layer patterns to shares.
        budget: Instead of an energy: what the edit is predicted to cost, over all its layers, in nats per position. By
            default 0.02 for a single layer, 0.002 for several, and 0.0003 for a soft edit. An edit costs more than is
            predicted: use --perplexity, or evaluate the edited model.
        reference: Checkpoint that this one was fine-tuned from: the update since is edited. Weights without factors go
            back towards it, too, less than the others. The factors may be those of either.
        scale: Factor of what is kept of the update of all weights, in (0, 1].
            Without it --perplexity finds it for a soft edit.
        layers: fnmatch patterns on the layers of the factor file, or, where there is a model folder, presets (last-mlp,
            mlp, attention, linear); by default all of them.
        score: What decides what is kept: kfac, activations, saliency, or, if the factors have it, ekfac, coupled.
        soft: Shrink what has a low score instead of dropping it; always where an update is edited, with --reference or
            of an adapter, without an --energy.
        scope: Compare scores within each layer, or over the layers of the whole model; by default within each layer for
            an --energy, and over all for a --budget.
        min_positions: Positions that the factors of a layer must rest on, or it is left as it is; by default as many as
            its live inputs and outputs; 0 edits it whatever they rest on.
        perplexity: Instead of an energy: find the strongest edit that raises the perplexity of --corpus to at most this
            multiple, 1.1 for example, on one half of its windows; what it costs on the other half is printed. Of a soft
            edit of an update, one strength for all layers is found, as with --budget.
        corpus: Text file, or JSON lines with a field "text", for --perplexity; of several none may exceed it.
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
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    from lightning_curvature.checkpoints.adapter import is_adapter
    from lightning_curvature.editing import streaming
    from lightning_curvature.editing.budget import careful_budget
    from lightning_curvature.editing.reference import Reference
    from lightning_curvature.factors.basis_cache import bases_in
    from lightning_curvature.factors.kronecker import KroneckerFactors

    if budget is not None and (energy, perplexity, forget) != (None, None, None):
        raise ValueError("--budget says how strong the edit is: give no --energy, --perplexity or --forget beside it.")
    if scope is not None and forget is not None:
        raise ValueError("--forget edits each layer by itself: leave --scope out.")
    if scale != 1.0 and reference is None:
        raise ValueError("--scale is used by --reference alone, which is not given. Leave it out.")
    options = {"perplexity": perplexity, "corpus": corpus, "forget": forget, "half": half, "strength": strength}
    options |= {"model": model, "tokens": tokens, "context": context}
    given = {name: value for name, value in options.items() if value is not None}
    check_options(given, checkpoint, layers, energy)
    if dry_run and save_delta is not None:
        raise ValueError("--dry-run writes nothing: leave --save-delta out.")
    check_bases(bases, [checkpoint, to_hf, model])
    allowed = allow_global or []
    source = streaming.open_to_edit(checkpoint, out, overwrite, save_delta, allowed, to_hf)
    if allowed and source.format != "archive":
        raise ValueError(f"--allow-global is for files of torch.save; {checkpoint} is none.")
    loaded = KroneckerFactors.open(factors)
    read = [path for path in (factors, *(corpus or []), forget, bases, reference) if path is not None]
    check_outputs([path for path in (out, save_delta) if path is not None], read, overwrite)
    models = (path for path in (checkpoint, to_hf, model) if path is not None and path.is_dir())
    folder = next((path for path in models if not is_adapter(path)), None)
    soft = soft or (energy is None and (reference is not None or is_adapter(checkpoint)))
    layers = named_layers(layers, loaded, folder)
    if (energy, budget, perplexity, forget) == (None, None, None, None):
        budget = careful_budget(soft, of_one_layer=len(_make_editor(1.0, layers).energies(loaded)) == 1)
    editor = _make_editor(energy, layers, score, soft, min_positions, budget, scope)
    if reference is not None:
        editor = editor.based_on(Reference(reference, allow_globals=allowed), scale)
    with bases_in(bases, write=not dry_run):
        editor, loaded, target = edit_on_data(editor, checkpoint, loaded, given, allowed, force)
        said, facts = (f"{target['text']}\n", {"target": target}) if target else ("", {})
        if dry_run:
            plan = streaming.plan_edit(editor, checkpoint, loaded, allowed, device, force)
            return Output(f"{said}{plan}", {**dataclasses.asdict(plan), **facts})
        write = partial(streaming.edit_checkpoint, overwrite=overwrite, delta=save_delta, to_hf=to_hf, device=device)
        report = write(editor, checkpoint, loaded, out, allow_globals=allowed, force=force)
    shown = f"{said}{report}\n{streaming.matches(report)}\nWritten to {out}"
    if report.warning is not None:
        shown += f"\n{report.warning}"
    values = {"out": str(out), **dataclasses.asdict(report), "predicted_loss": report.predicted_loss, **facts}
    return Output(shown, values)


def _make_editor(
    energy: float | dict[str, float] | None,
    layers: list[str] | None,
    score: Score = "kfac",
    soft: bool = False,
    min_positions: int | None = None,
    budget: float | None = None,
    scope: Scope | None = None,
) -> "CurvatureEditor":
    from lightning_curvature.editing.curvature import CurvatureEditor

    return CurvatureEditor(energy, layers, score, soft, min_positions=min_positions, budget=budget, scope=scope)
