"""The digits demo: a small ViT memorizes noised labels, and forgets them again."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_curvature.analysis.directions import DirectionUse
from lightning_curvature.baselines.methods import CONTROL_LABELS
from lightning_curvature.demos.analyses import analyse_images
from lightning_curvature.demos.files import versions, write_edited, write_json
from lightning_curvature.demos.fitting import fit
from lightning_curvature.demos.label_noise import (
    MEMORIZED_LIMIT,
    balanced_subnet,
    changed_answers,
    compare_methods,
    energy_curves,
    evaluate,
    predict,
    table,
)
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.report import plots
from lightning_curvature.report.page import write_page
from lightning_curvature.search.energy import Match
from lightning_curvature.search.gap import curves
from lightning_curvature.search.price import Purchase
from lightning_curvature.trainer.callback import KFACEditCallback

log = logging.getLogger(__name__)

NUM_TRAIN = 1297
EPOCHS = 140


class NoisyDigits(NoisyLabels):
    """scikit-learn's 8 x 8 digits: 1297 training images, 10 % of them with a wrong label, and 500 for validation.

    Args:
        noise: Fraction of training labels that is replaced by another class.
        batch_size: Images per batch.
        seed: Seed of the split and the noise.
        asymmetric: Each class is replaced by the next one, always.
    """

    def __init__(self, noise: float = 0.1, batch_size: int = 64, seed: int = 0, asymmetric: bool = False) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16 - 0.5
        super().__init__(images, torch.tensor(digits.target), NUM_TRAIN, noise, batch_size, seed, asymmetric)


def build_model() -> LitViT:
    """Return a model that memorizes the noised digits, most of all in the MLP of its last block."""
    return LitViT(weight_decay=0.5, attention_decay=4.0)


def train_digits(out: Path, seed: int, epochs: int) -> tuple[LitViT, NoisyDigits, KFACEditCallback, pl.Trainer]:
    """Train the model of the demo with the callback; the callback holds the factors then."""
    pl.seed_everything(seed, verbose=False)
    data, model, callback = NoisyDigits(seed=seed), build_model(), KFACEditCallback()
    often = max(epochs // 10, 1)
    trainer = fit(model, data, callback, out, max_epochs=epochs, check_val_every_n_epoch=often)
    return model, data, callback, trainer


def run_digits(out: Path, seed: int = 0, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train, collect, edit and evaluate on scikit-learn's digits with 10 % noised labels.

    Writes ``original.ckpt``, ``edited.ckpt`` (at the energy that is chosen on the tuning half),
    ``factors.safetensors``, ``report.json``, ``analysis.json``, ``report.html``, ``logs/`` and pictures into ``out``.
    The callback writes ``original-edited.ckpt``, whose strength follows from the price that it measured.

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
    # Those of the layers that are edited by default, whatever the callback has chosen in the end.
    factors = callback.factors if callback.run is None else callback.run.windows.factors
    trainer.save_checkpoint(out / "original.ckpt", weights_only=False)
    factors.save(out / "factors.safetensors")

    train, val = data.halves()["report"]
    before = evaluate(model, train, val)
    with callback.editor.applied(model, callback.factors) as of_callback:
        kept = [layer.energy_kept for layer in of_callback.layers.values()]
        default = {"energy": round(sum(kept) / len(kept), 3), **evaluate(model, train, val)}
        changed = predict(model, train).argmax(1)
    unchanged = predict(model, train).argmax(1)
    curves = energy_curves(model, factors, data)
    methods = compare_methods(curves)
    methods["bsn"] = balanced_subnet(model, factors, data)
    energy = methods["kfac"]["energy"]
    edit = write_edited(out / "original.ckpt", CurvatureEditor(energy), factors, out / "edited.ckpt")
    edited = LitViT.load_from_checkpoint(out / "edited.ckpt", map_location="cpu", weights_only=True)
    after = evaluate(edited, train, val)
    ended = time.perf_counter()

    wrong = train.tensors[1] != train.tensors[2]
    report = {
        "before": before,
        "after": after,
        "default": default,
        "methods": methods,
        "curves": curves,
        "choice": _choice(callback.match),
        "changed": changed_answers(train, unchanged, changed),
        "moved": {name: dataclasses.asdict(layer) for name, layer in of_callback.layers.items()},
        "layers": {name: dataclasses.asdict(layer) for name, layer in edit.layers.items()},
        "counts": {"noised": int(wrong.sum()), "clean": int((~wrong).sum()), "val": len(val)},
        "settings": {"seed": seed, "epochs": epochs, "layers": list(factors), "energy": energy},
        "seconds": {"train": trained - started, "edit_and_evaluate": ended - trained},
        "versions": versions(),
    }
    write_json(out / "report.json", report)
    analyses = analyse_images(model, factors, train)
    analyses.save(out)
    draw_energies(out, factors, report)
    draw_images(out, train, unchanged, predict(edited, train).argmax(1), analyses.directions)
    write_page(out)
    log.info("\n%s", edit)
    return report


def _choice(match: Match | Purchase | None) -> dict[str, Any]:
    """Return what the callback has measured to choose its edit, and which one it is."""
    if not isinstance(match, Purchase):
        return {}
    rows = [{"edit": name, **row} for name, row in curves(match.tried)]
    return {"rows": rows, "name": match.name, "budget": match.budget, "text": str(match)}


def draw_energies(out: Path, factors: KroneckerFactors, report: Mapping[str, Any]) -> None:
    """Draw the spectrum of the first layer and the energy curve."""
    name, energy = next(iter(factors)), report["settings"]["energy"]
    plots.save(plots.spectrum(factors[name], energy, name), out / "spectrum.png")
    plots.save(plots.energy_curves(report["curves"]["report"]["kfac"], report["before"], energy), out / "energy.png")


def draw_images(
    out: Path, train: TensorDataset, before: Tensor, after: Tensor, directions: Sequence[DirectionUse]
) -> None:
    """Draw images with wrong labels, and the images that use some directions most.

    Args:
        out: Folder to write to.
        train: Images, noised labels, clean labels.
        before: What the model predicts of them before the edit, ``[n]``.
        after: What it predicts after the edit, ``[n]``.
        directions: Which images use which directions; of each kind the last four directions are drawn.
    """
    images, noised, clean = train.tensors
    plots.save(plots.noised_examples(images, noised, clean, before, after), out / "examples.png")
    rows = {
        f"{'flat' if use.flat else 'sharp'}, {place}": top
        for use in directions
        for place, top in list(zip(use.directions, use.top, strict=True))[-4:]
    }
    plots.save(plots.direction_images(images, rows, (noised != clean).tolist()), out / "directions.png")


def summary(report: Mapping[str, Any]) -> str:
    """Return what :func:`run_digits` returned as a before/after table with controls."""
    default, methods = report["default"], report["methods"]
    rows = {
        "before": report["before"],
        "after, as KFACEditCallback() edits": default,
        "after (edited.ckpt)": {"energy": report["settings"]["energy"], **report["after"]},
        **{label: methods[method] for method, label in CONTROL_LABELS.items()},
    }
    counts = report["counts"]
    return (
        f"{table(rows)}\n\nIn % of {counts['noised']} noised and {counts['clean']} clean training labels and "
        f"{counts['val']} validation images.\nEnergies were chosen on others: highest validation accuracy with at most "
        f"{MEMORIZED_LIMIT:.0%} memorized. BalancedSubnet alone was told which labels of the others are wrong."
    )
