"""The price of an edit where the user names none: it is measured on batches that the run has seen."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
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
    """Keeps batches of a run, and finds the strongest edit whose cost on them is within the price.

    For a classifier the cost is the error on validation batches: its loss falls when over-confidence goes, also where
    classes are lost. For a text it is the loss of a token. Both are counted from the lowest point on the path of ever
    stronger edits. Without a validation loop the batches are those of training.
    """

    def __init__(self) -> None:
        self._step = ""
        self._batches: dict[int, list[Arguments]] = {}  # by dataloader

    def start(self, step: str) -> None:
        """Forget the batches, since a loop begins whose steps are of a name."""
        self._step, self._batches = step, {}

    def add(
        self, module: pl.LightningModule, batch: Any, batch_idx: int, loader: int = 0, num_loaders: int = 1
    ) -> None:
        """Keep a batch of the loop if there is room, with the other arguments of its step."""
        kept = self._batches.setdefault(loader, [])
        if len(kept) < BATCHES:
            step = getattr(module, self._step)
            indices = [batch_idx] if is_param_in_hook_signature(step, "batch_idx", min_args=2) else []
            indices += [loader] if num_loaders > 1 else []
            kept.append((move_data_to_device(batch, torch.device("cpu")), *indices))

    def find(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: CurvatureEditor, factors: KroneckerFactors
    ) -> Purchase | None:
        """Return the strongest edit within the price; None, with a warning, if nothing can be measured. A collective.

        Args:
            trainer: The Trainer.
            module: The module; it is left as it was.
            editor: Edits it; its budget does not matter.
            factors: Its factors.
        """
        try:
            return self._find(trainer, module, editor, factors)
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            self._tell(editor, f"{type(error).__name__}: {error}")
        return None

    def _find(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: CurvatureEditor, factors: KroneckerFactors
    ) -> Purchase | None:
        first = self._read(trainer, module, editor, 0)
        if not first or any(reading.positions == 0 for reading in first.values()):
            self._tell(editor, f"no softmax loss was seen in {self._step or 'a validation'}")
            return None
        of_classes = all(reading.of_classes for reading in first.values())
        allowed = dict.fromkeys(first, CLASS_RISE if of_classes else TEXT_RISE)

        def measure(part: int = 0) -> Mapping[str, float]:
            readings = self._read(trainer, module, editor, part)
            return {name: reading.error if of_classes else reading.loss for name, reading in readings.items()}

        purchase = spend(editor, module, factors, measure, Price(allowed, PREDICTED))
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
            reading = read_losses(trainer, module, self._step, batches, editor.ranks)
            if reading.positions:
                name = self._step.removesuffix("_step")
                readings[f"{name} {loader}" if len(self._batches) > 1 else name] = reading
        return readings

    def _tell(self, editor: CurvatureEditor, reason: str) -> None:
        rank_zero_warn(
            f"The price of the edit could not be measured ({reason}). The edit is one that is predicted to cost "
            f"{editor.budget:g} nats of the loss; look at what it does, or say what it may cost: target=, budget= or "
            "energy=."
        )
