"""The price of an edit where the user names none: it is measured on batches of the validation loop."""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.budget import careful_budget
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.price import Costs, Price, Purchase, spend, spend_on_update
from lightning_curvature.trainer.samples import Arguments, Reading, read_losses

BATCHES, BYTES = 32, 2**28
"""Batches of each dataloader that are kept, and bytes of all: half of them to choose on, and half to report from."""
LOSS_RISE = 0.02
"""How far the loss of a token may rise above its lowest point on the path, in nats: a perplexity of 1.02 times."""
LOSS_RISE_OF_CLASSES, LOSS_SHARE_OF_CLASSES = 0.05, 0.1
"""The same for a classifier, and as a share of the unedited model's loss: the smaller one counts.

An edit takes confidence away before accuracy; a loss of 0.01 that becomes 0.06 is no small rise."""
LOSS_SHARE_OF_SQUARES = 2 * LOSS_RISE
"""The same for squared errors, as a share: 0.02 nats of a normal distribution whose variance is the mean error."""
ERROR_RISE = 0.005
"""How far the error of a classifier may rise above that of the unedited model: half a point of accuracy.

Where batches are few it is one standard error of that error, since less cannot be told from chance."""


class MeasuredPrice:
    """Keeps batches of a validation loop, and finds the strongest edit whose cost on them is within the price.

    The loss may rise above its lowest point on the path of stronger and stronger edits: that of a token by 0.02 nats,
    that of a classifier by a tenth, at most 0.05. Counted from the unedited model's it would be no limit: it falls
    where over-fitting and over-confidence go, also where classes are lost. The error of a classifier may rise by half a
    point, or one standard error, above that of the unedited model. Batches that were trained on tell no
    price: to forget them is what an edit is for.

    Attributes:
        of_updates: Whether updates are edited, since a reference or of an adapter, and not weights.
        predicted: Predicted loss of the first edit that is tried, and of the only one where nothing can be measured.
    """

    def __init__(self) -> None:
        self.of_updates, self.predicted = False, careful_budget(soft=False, of_one_layer=True)
        self.start()

    def start(self) -> None:
        """Forget the batches, since a run or a validation begins."""
        self._batches: dict[int, list[Arguments]] = {}  # by dataloader
        self._room = BYTES

    def add(self, module: pl.LightningModule, batch: Any, batch_idx: int, loader: int, num_loaders: int) -> None:
        """Keep a copy of a batch of the validation if there is room, with the other arguments of its step."""
        kept = self._batches.setdefault(loader, [])
        if len(kept) < BATCHES and self._room > 0:
            takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
            indices = [*([batch_idx] if takes_index else []), *([loader] if num_loaders > 1 else [])]
            own = copy.deepcopy(move_data_to_device(batch, torch.device("cpu")))
            kept.append((own, *indices))
            apply_to_collection(own, torch.Tensor, self._take_room)

    def batches(self, ranks: Ranks) -> list[Arguments]:
        """Return all that is kept, as much as every process has. A collective."""
        kept = [self._batches.get(loader, []) for loader in sorted(set().union(*ranks.gather(set(self._batches))))]
        return [arguments for batches in kept for arguments in batches[: min(ranks.gather(len(batches)))]]

    def _take_room(self, tensor: torch.Tensor) -> None:
        self._room -= tensor.nbytes

    def find(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: CurvatureEditor, factors: KroneckerFactors
    ) -> Purchase | None:
        """Return the strongest edit within the price; None, which is told, if nothing can be measured. A collective.

        Args:
            trainer: The Trainer.
            module: The module; it is left as it was.
            editor: Edits it; its strength does not matter.
            factors: Its factors.
        """
        instead = (
            f"The edit is one that is predicted to cost {self.predicted:g} nats. Measure what it does, or say what it "
            "may cost: target=, budget= or energy=."
        )
        try:
            purchase = self._find(trainer, module, editor, factors)
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            rank_zero_warn(f"The price of the edit could not be measured: {type(error).__name__}: {error}. {instead}")
            self.start()
            return None
        if purchase is None:
            reason = "validation_step computed no known loss" if self._batches else "there was no validation"
            rank_zero_info(f"The price of the edit was not measured, since {reason}. {instead}")
        self.start()
        return purchase

    def _find(
        self, trainer: pl.Trainer, module: pl.LightningModule, editor: CurvatureEditor, factors: KroneckerFactors
    ) -> Purchase | None:
        def read(part: int) -> dict[str, Reading]:
            """Return what one half of the batches says, by dataloader; nothing of one without a loss."""
            readings = {}
            for loader in sorted(set().union(*editor.ranks.gather(set(self._batches)))):
                batches = self._batches.get(loader, [])[part::2]
                reading = read_losses(trainer, module, batches, editor.ranks)
                if reading.positions:
                    readings[f"validation {loader}" if len(self._batches) > 1 else "validation"] = reading
            return readings

        def measure(part: int = 0) -> Costs:
            return _costs(read(part))

        first = read(0)
        if not first:
            return None
        allowed = {f"{name} loss": (LOSS_RISE, True) for name in first}
        for name, reading in first.items():
            if reading.of_classes:
                rise = min(LOSS_RISE_OF_CLASSES, LOSS_SHARE_OF_CLASSES * reading.loss)
                allowed[f"{name} loss"] = (max(rise, 1e-6), True)
                chance = math.sqrt(reading.error * (1 - reading.error) / reading.positions)
                allowed[f"{name} error"] = (max(ERROR_RISE, chance), False)
            elif reading.squared:
                allowed[f"{name} loss"] = (max(LOSS_SHARE_OF_SQUARES * reading.loss, 1e-12), True)
        price = Price(allowed, self.predicted)
        if self.of_updates:
            purchase = spend_on_update(editor, module, factors, measure, price, _losses, _costs(first))
        else:
            purchase = spend(editor, module, factors, measure, price, _costs(first))
        held_out = measure(part=1)
        if not held_out or not purchase.budget:
            return purchase
        bought = editor.within(purchase.budget)
        bought.scale = purchase.scale
        with bought.applied(module, factors):
            after = measure(part=1)
        return dataclasses.replace(purchase, held_out={name: (held_out[name], after[name]) for name in held_out})


def _costs(readings: Mapping[str, Reading]) -> Costs:
    costs = {f"{name} loss": reading.loss for name, reading in readings.items()}
    return costs | {f"{name} error": reading.error for name, reading in readings.items() if reading.of_classes}


def _losses(costs: Costs) -> float:
    return sum(cost for name, cost in costs.items() if name.endswith("loss"))
