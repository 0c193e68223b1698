"""The digits demo: a small ViT memorizes noised labels, and forgets them again."""

import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from sklearn.datasets import load_digits

from lightning_curvature.baselines.methods import CONTROL_LABELS
from lightning_curvature.demos.analyses import analyse_images
from lightning_curvature.demos.files import versions, write_edited, write_json
from lightning_curvature.demos.label_noise import (
    MEMORIZED_LIMIT,
    balanced_subnet,
    compare_methods,
    energy_curves,
    evaluate,
    predict,
    table,
)
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.report import plots
from lightning_curvature.report.page import write_page
from lightning_curvature.trainer.callback import KFACEditCallback

log = logging.getLogger(__name__)

NUM_TRAIN = 1297
EPOCHS = 140


class NoisyDigits(NoisyLabels):
    """scikit-learn's 8 x 8 digits: 1297 training images, 10 % of them with a wrong label, and 500 for validation.

    Args:
        noise: Share of training labels replaced by another class.
        batch_size: Images per batch.
        seed: Seed of the split and the noise.
    """

    def __init__(self, noise: float = 0.1, batch_size: int = 64, seed: int = 0) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16 - 0.5
        super().__init__(images, torch.tensor(digits.target), NUM_TRAIN, noise, batch_size, seed)


def build_model() -> LitViT:
    """Return a model that memorizes the noised digits, most of all in the MLP of its last block."""
    return LitViT(weight_decay=0.5, attention_decay=4.0)


def train_digits(out: Path, seed: int, epochs: int) -> tuple[LitViT, NoisyDigits, KFACEditCallback, pl.Trainer]:
    """Train the demo's model with the callback, as any user would."""
    pl.seed_everything(seed, verbose=False)
    data, model, callback = NoisyDigits(seed=seed), build_model(), KFACEditCallback()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        gradient_clip_val=1.0,
        check_val_every_n_epoch=max(epochs // 10, 1),
        log_every_n_steps=20,
        logger=CSVLogger(out, name="", version="logs"),
        enable_checkpointing=False,  # saved by hand below, under the demo's own names
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # the data are in memory
        trainer.fit(model, data)
    return model, data, callback, trainer


def run_digits(out: Path, seed: int = 0, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train, collect, edit and evaluate on scikit-learn's digits with 10 % noised labels.

    Writes ``original.ckpt`` (with ``original-edited.ckpt``, which the callback leaves beside it at its default energy),
    ``edited.ckpt`` (at the energy chosen on the tuning part), ``factors.safetensors``, ``report.json``,
    ``analysis.json``, ``report.html``, ``logs/`` and pictures into ``out``.

    Args:
        out: Folder to write to.
        seed: Seed of the split, the noise and the training.
        epochs: Passes over the training images.

    Returns:
        What ``report.json`` holds.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model, data, callback, trainer = train_digits(out, seed, epochs)
    trained = time.perf_counter()
    factors = callback.factors
    trainer.save_checkpoint(out / "original.ckpt", weights_only=False)
    factors.save(out / "factors.safetensors")

    train, val = data.halves()["report"]
    before = evaluate(model, train, val)
    curves = energy_curves(model, factors, data)
    methods = compare_methods(curves)
    methods["bsn"] = balanced_subnet(model, factors, data)
    energy = methods["kfac"]["energy"]
    edit = write_edited(out / "original.ckpt", CurvatureEditor(energy), factors, out / "edited.ckpt")
    edited = LitViT.load_from_checkpoint(out / "edited.ckpt", map_location="cpu", weights_only=True)
    after = evaluate(edited, train, val)
    default = curves["report"]["kfac"][DEFAULT_ENERGY]
    ended = time.perf_counter()

    name = next(iter(factors))
    plots.save(plots.spectrum(factors[name], energy, name), out / "spectrum.png")
    plots.save(plots.energy_curves(curves["report"]["kfac"], before, energy), out / "energy.png")
    images, noised, clean = train.tensors
    answers = predict(model, train).argmax(1), predict(edited, train).argmax(1)
    plots.save(plots.noised_examples(images, noised, clean, *answers), out / "examples.png")
    report = {
        "before": before,
        "after": after,
        "default": {"energy": DEFAULT_ENERGY, **default},
        "methods": methods,
        "curves": curves,
        "layers": {name: dataclasses.asdict(layer) for name, layer in edit.layers.items()},
        "counts": {"noised": int((noised != clean).sum()), "clean": int((noised == clean).sum()), "val": len(val)},
        "settings": {"seed": seed, "epochs": epochs, "layers": list(factors), "energy": energy},
        "seconds": {"train": trained - started, "edit_and_evaluate": ended - trained},
        "versions": versions(),
    }
    write_json(out / "report.json", report)
    analyses = analyse_images(model, factors, train)
    analyses.save(out)
    rows = {
        f"{'flat' if use.flat else 'sharp'}, {place}": top
        for use in analyses.directions
        for place, top in list(zip(use.directions, use.top, strict=True))[-4:]
    }
    plots.save(plots.direction_images(images, rows, (noised != clean).tolist()), out / "directions.png")
    write_page(out)
    log.info("\n%s", edit)
    return report


def summary(report: Mapping[str, Any]) -> str:
    """Return what :func:`run_digits` returned as a before/after table with controls."""
    default, methods = report["default"], report["methods"]
    rows = {
        "before": report["before"],
        f"after, default energy {default['energy']:g}": default,
        "after (edited.ckpt)": {"energy": report["settings"]["energy"], **report["after"]},
        **{label: methods[method] for method, label in CONTROL_LABELS.items()},
    }
    counts = report["counts"]
    return (
        f"{table(rows)}\n\nIn % of {counts['noised']} noised and {counts['clean']} clean training labels and "
        f"{counts['val']} validation images.\nEnergies were chosen on others: highest validation accuracy with at most "
        f"{MEMORIZED_LIMIT:.0%} memorized. BalancedSubnet alone was told which labels of the others are wrong."
    )
