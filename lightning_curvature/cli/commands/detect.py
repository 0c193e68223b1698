"""The command ``detect``."""

import csv
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from lightning_curvature.cli import configs
from lightning_curvature.cli.choices import ImagePositions
from lightning_curvature.cli.commands.inputs import (
    check_allowed,
    check_counts,
    check_files,
    check_unused,
    read_factors,
    unless_folder,
)
from lightning_curvature.cli.commands.output import Output, extra
from lightning_curvature.storage.atomic import replacing

if TYPE_CHECKING:
    from lightning_curvature.factors.kronecker import KroneckerFactors


def detect(
    factors: Path,
    out: Path,
    model: Path | None = None,
    sequences: Path | None = None,
    corpus: Path | None = None,
    config: str | None = None,
    checkpoint: Path | None = None,
    layer: str | None = None,
    positions: ImagePositions | None = None,
    tokens: int | None = None,
    context: int | None = None,
    batch_size: int = 32,
    overwrite: bool = False,
    force: bool = False,
    allow_global: list[str] | None = None,
) -> Output:
    """Rank windows of text, or training images, by how memorized they look to a model, without labels; write CSV.

    The score is the share of an example's activation energy in the flat half of a layer's curvature basis. Text needs
    --model with --sequences or --corpus, images need --config with --checkpoint.

    Example:
        lightning-curvature detect --model MODEL --factors F.safetensors --corpus text.jsonl --out ranked.csv
        lightning-curvature detect --config config.yaml --checkpoint last.ckpt --factors F.safetensors --out ranked.csv

    Args:
        factors: Factor file of the model (.safetensors).
        out: CSV file to write: rank, score, what the model's own predictions say, number of the example, text or label.
        model: Folder of a causal LM, written by save_pretrained, with its tokenizer.
        sequences: JSON lines with prefix_ids and suffix_ids, all of one length, to rank.
        corpus: Text file, or JSON lines with a field "text", of which windows are ranked.
        config: Configuration of lightning-curvature fit, such as LightningCLI saves; its training set is ranked.
        checkpoint: Take the weights from here instead (.ckpt, .pt, .safetensors; with --model also a folder).
        layer: The layer whose inputs count; by default the last one of the factor file.
        positions: Positions of an image that count, first for a class token; by default all.
        tokens: Tokens of the corpus to read at most; by default 100000.
        context: Tokens of a window of the corpus, those that the tokenizer puts in front among them; by default 64, or
            what the model takes if that is less.
        batch_size: Examples per forward pass.
        overwrite: Replace what is at out.
        force: Use factors that were collected on other weights, such as those before a fine-tune.
        allow_global: Classes that a .ckpt or .pt may hold besides tensors and primitives; only for trusted files.
    """
    inputs = {"--factors": unless_folder(factors), "--sequences": sequences, "--corpus": corpus}
    inputs |= {"--checkpoint": checkpoint if model is None else unless_folder(checkpoint)}
    read = [model, checkpoint, None if config is None else Path(config)]
    check_files({"--out": out}, inputs, overwrite, models=read)
    if config is not None and not (Path(config).is_file() or (resources.files(configs) / config).is_file()):
        raise FileNotFoundError(f"No such file: {config} (--config).")
    allowed = check_allowed(allow_global, checkpoint)
    check_counts(tokens=tokens, context=context, batch_size=batch_size)
    if config is not None and checkpoint is not None and (model, sequences, corpus) == (None, None, None):
        check_unused("it is for windows of text", tokens=tokens, context=context)
        rows = _rank_images(
            config, checkpoint, read_factors(factors), layer, positions or "all", batch_size, force, allowed
        )
    elif config is not None or model is None:
        raise ValueError(
            "Give the model: for text --model with --sequences or --corpus, for images --config with --checkpoint."
        )
    elif positions is not None:
        raise ValueError(f"--positions {positions} is for images; of a window of text all positions count.")
    else:
        if corpus is None:
            check_unused("it is about the text of --corpus", tokens=tokens, context=context)
        with extra("text"):
            from lightning_curvature.text.detection import rank_windows
        rows = rank_windows(
            model,
            checkpoint,
            read_factors(factors),
            sequences=sequences,
            corpus=corpus,
            layer=layer,
            tokens=tokens or 100_000,
            context=context,
            batch_size=batch_size,
            force=force,
            allow_globals=allowed,
        )
    _write_csv(out, rows)
    shown = [{name: _short(value) for name, value in row.items()} for row in rows[:10]]
    table = tabulate(shown, "keys", disable_numparse=True)
    return Output(f"{table}\n{len(rows)} examples written to {out}", {"out": str(out), "rows": rows})


def _rank_images(
    config: str,
    checkpoint: Path,
    factors: "KroneckerFactors",
    layer: str | None,
    positions: str,
    batch_size: int,
    force: bool,
    allowed: Sequence[str],
) -> list[dict[str, Any]]:
    """Return the training images of a configuration, as :func:`lightning_curvature.analysis.labels.rank_labelled`."""
    import torch

    from lightning_curvature.analysis.inputs import check_layer, chosen_layer
    from lightning_curvature.analysis.labels import rank_labelled
    from lightning_curvature.checkpoints.loading import load_weights, read_weights
    from lightning_curvature.cli.lightning import instances
    from lightning_curvature.editing.origin import check_loaded
    from lightning_curvature.factors.files import is_factor_file

    layer = check_layer(factors, layer)
    if checkpoint.suffix == ".safetensors" and is_factor_file(checkpoint):
        raise ValueError(f"{checkpoint} holds K-FAC factors, not weights. Name the model's checkpoint.")
    module, data = instances(config)
    load_weights(module, read_weights(checkpoint, allowed), checkpoint)
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    name, layer_factors = chosen_layer(factors, layer, module)
    check_loaded(module, {layer: name}, factors, checkpoint, force=force, allow_globals=allowed)
    data.prepare_data()
    data.setup("fit")
    return rank_labelled(module, data.train_dataloader(), name, layer_factors, positions, batch_size)


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(path) as temporary, Path(temporary).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _short(value: float | int | str) -> str:
    return f"{value:.4f}" if isinstance(value, float) else " ".join(str(value).split())[:60]
