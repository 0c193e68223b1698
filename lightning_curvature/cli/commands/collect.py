"""The commands ``collect`` and ``merge``: factors of one text or of several."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lightning_curvature._checks import check_share, check_weights
from lightning_curvature.cli.choices import AccumulateOn, Fisher, Positions
from lightning_curvature.cli.commands.inputs import (
    check_allowed,
    check_counts,
    check_files,
    check_unused,
    unless_folder,
)
from lightning_curvature.cli.commands.output import Output, extra

if TYPE_CHECKING:
    from lightning_curvature.factors.layer import LayerFactors


def collect(
    model: Path,
    corpus: list[Path],
    out: Path,
    weights: list[float] | None = None,
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
        corpus: Text file, or JSON lines (.jsonl) with a field "text"; several for factors of a mixture.
        out: Factor file to write (.safetensors).
        weights: What each corpus counts, whatever its length; by default all count the same.
        layers: Presets (last-mlp, mlp, attention, linear) or fnmatch patterns on module names; by default mlp in a
            network of more than six blocks, and last-mlp in others.
        tokens: Tokens of each corpus to read at most.
        context: Tokens of a window, those that the tokenizer puts in front among them; by default 512, or what the
            model takes if that is less.
        batch_size: Windows per forward pass.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors, or a folder).
        fisher: Where the gradients come from: the model's own distribution, or (empirical) the data.
        draws: Backward passes per batch of sketched and sampled.
        positions: Positions that count.
        passes: Groups of layers, each with a pass of its own over each corpus, to save memory.
        accumulate_on: Where the factors are summed: model (the device of each layer), cpu, or auto (the device of each
            layer if they fit there).
        share: Share of the positions of each batch that is used, chosen at random.
        save_every: Batches between two saves of the progress.
        seed: Seed of the random draws.
        overwrite: Replace what is at out.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    inputs = {"--corpus": corpus, "--checkpoint": unless_folder(checkpoint)}
    check_files({"--out": out}, inputs, overwrite, models=[model, checkpoint])
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(
        tokens=tokens, context=context, batch_size=batch_size, draws=draws, passes=passes, save_every=save_every
    )
    check_share(share, "--share")
    if len(corpus) == 1:
        check_unused("there is one --corpus", weights=weights)
    if weights is not None:
        check_weights(weights, len(corpus), "--weights")
    if draws > 1 and fisher in ("exact", "empirical"):
        check_unused(f"fisher {fisher} has no draws", draws=draws)
    with extra("text"):
        from lightning_curvature.text.collecting import WINDOW, collect_text
        from lightning_curvature.text.corpus import token_windows
        from lightning_curvature.text.saved import SavedModel
    saved = SavedModel(model, checkpoint, allowed)
    _check_name(out)
    context = saved.window(context, WINDOW)
    for path in corpus:
        next(token_windows(path, saved.tokenizer, context, tokens))  # raises if it is too short for a window
    saved.check_predicts(context)
    saved.check_layers(layers)
    factors = collect_text(
        saved.load(),
        saved.tokenizer,
        corpus,
        out,
        weights=weights,
        layers=layers,
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
    return _written(factors, out)


def merge(
    paths: list[Path],
    out: Path,
    weights: list[float] | None = None,
    force: bool = False,
    overwrite: bool = False,
) -> Output:
    """Merge factor files of one model, from several texts or machines, into one.

    Example:
        lightning-curvature merge prose.safetensors code.safetensors --weights 1 2 --out both.safetensors

    Args:
        paths: Factor files, two or more.
        out: Factor file to write (.safetensors).
        weights: What each file counts, whatever its positions; by default each counts with its positions.
        force: Merge factors that were collected on other weights, too.
        overwrite: Replace what is at out.
    """
    check_files({"--out": out}, {"PATHS": paths}, overwrite)
    if weights is not None:
        check_weights(weights, len(paths), "--weights")
    _check_name(out)
    from lightning_curvature.factors.merging import merge_files

    factors = merge_files(paths, weights, force)
    factors.save(out)
    return _written(factors, out)


def _check_name(out: Path) -> None:
    """Raise ``ValueError`` if a factor file is to be written under a name that no command reads."""
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: factors are written to a safetensors file; give it a name that ends so.")


def _written(factors: "Mapping[str, LayerFactors]", out: Path) -> Output:
    return Output(f"{_table(factors)}\nWritten to {out}", {"out": str(out), "layers": _facts(factors)})


def _facts(factors: "Mapping[str, LayerFactors]") -> dict[str, dict[str, Any]]:
    return {
        name: {"shape": layer.shape, "num_inputs": layer.num_inputs, "num_seen": layer.num_seen}
        for name, layer in factors.items()
    }


def _table(factors: "Mapping[str, LayerFactors]") -> str:
    rows = [
        [name, *layer.shape, layer.num_inputs, f"{1 - layer.num_inputs / max(layer.num_seen, 1):.1%}"]
        for name, layer in factors.items()
    ]
    return tabulate(rows, ["layer", "d_out", "d_in", "positions", "not counted"])
