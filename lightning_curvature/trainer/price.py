"""The price of an edit where the user names none: it is measured on batches that the run has seen."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.price import Price, Purchase, spend
from lightning_curvature.trainer.samples import Arguments, Reading, read_losses

BATCHES = 32
"""Batches of each dataloader that are kept: half of them to choose on, and half to report from."""
TEXT_RISE = math.log(1.02)
"""How far the loss of a position may rise above its lowest point, in nats: a perplexity of 1.02 times."""
CLASS_RISE = 0.005
"""How far the error of a classifier may rise above its lowest point: half a point of accuracy."""
PREDICTED = 0.02
"""Predicted loss of the first edit that is tried, and of the only one where nothing can be measured, in nats."""


class MeasuredPrice:
    """Keeps batches of a validation loop, and finds the strongest edit whose cost on them is within the price.

    For a text the cost is the loss of a token, for a classifier the error. Both are counted from the lowest point on
    the path of ever stronger edits. The loss of a classifier falls when over-confidence goes, also where classes are
    lost: it may not become higher than it was. Batches that were trained on tell no price: to forget them is what an
    edit is for.
    """

    def __init__(self) -> None:
        self._batches: dict[int, list[Arguments]] = {}  # by dataloader

    def start(self) -> None:
        """Forget the batches, since a validation begins."""
        self._batches = {}

    def add(
        self, module: pl.LightningModule, batch: Any, batch_idx: int, loader: int = 0, num_loaders: int = 1
    ) -> None:
        """Keep a batch of the validation if there is room, with the other arguments of its step."""
        kept = self._batches.setdefault(loader, [])
        if len(kept) < BATCHES:
            takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
            indices = [*([batch_idx] if takes_index else []), *([loader] if num_loaders > 1 else [])]
            kept.append((move_data_to_device(batch, torch.device("cpu")), *indices))

    def find(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: CurvatureEditor, factors: KroneckerFactors
    ) -> Purchase | None:
        """Return the strongest edit within the price; None, which is told, if nothing can be measured. A collective.

        Args:
            trainer: The Trainer.
            module: The module; it is left as it was.
            editor: Edits it; its budget is the one of an edit that is not measured.
            factors: Its factors.
        """
        instead = (
            f"The edit is one that is predicted to cost {editor.budget:g} nats. Measure what it does, or say what it "
            "may cost: target=, budget= or energy=."
        )
        try:
            purchase = self._find(trainer, module, editor, factors)
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            rank_zero_warn(f"The price of the edit could not be measured: {type(error).__name__}: {error}. {instead}")
            return None
        if purchase is None:
            reason = "validation_step computed no softmax loss" if self._batches else "there was no validation"
            rank_zero_info(f"The price of the edit was not measured, since {reason}. {instead}")
        return purchase

    def _find(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: CurvatureEditor, factors: KroneckerFactors
    ) -> Purchase | None:
        first = self._read(trainer, module, editor, 0)
        if not first:
            return None
        of_classes = all(reading.of_classes for reading in first.values())

        def measure(part: int = 0) -> Mapping[str, float]:
            readings = self._read(trainer, module, editor, part)
            losses = {f"{name} loss": reading.loss for name, reading in readings.items()}
            errors = {f"{name} error": reading.error for name, reading in readings.items()}
            return {**errors, **losses} if of_classes else losses

        def price(name: str) -> tuple[float, bool]:
            return (CLASS_RISE, True) if name.endswith("error") else (TEXT_RISE, not of_classes)

        costs = measure()
        purchase = spend(
            editor, module, factors, measure, Price({name: price(name) for name in costs}, PREDICTED), costs
        )
        before = measure(1)
        if not before or not purchase.budget:
            return purchase
        with editor.within(purchase.budget).applied(module, factors):
            after = measure(1)
        return dataclasses.replace(purchase, held_out={name: (before[name], after[name]) for name in before})

    def _read(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: CurvatureEditor, part: int
    ) -> dict[str, Reading]:
        """Return what one half of the batches says, by the name of the cost; nothing of a loader without any."""
        readings = {}
        for loader in sorted(set().union(*editor.ranks.gather(set(self._batches)))):
            batches = self._batches.get(loader, [])[part::2]
            reading = read_losses(trainer, module, batches, editor.ranks)
            if reading.positions:
                readings[f"validation {loader}" if len(self._batches) > 1 else "validation"] = reading
        return readings
