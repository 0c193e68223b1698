"""The price of an edit where the user names none: it is measured on batches of the validation loop."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_curvature.editing.budget import careful_budget
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.gap import Candidate, choose, table
from lightning_curvature.search.price import Costs, Price, Purchase, spend, spend_on_update
from lightning_curvature.trainer.samples import Arguments, Reading, Sample

DEFAULT = "default layers"
"""Name of the edit of the layers that are edited by default."""
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


class Found(NamedTuple):
    """The strongest edit within the price, and what it edits."""

    purchase: Purchase
    candidate: Candidate


class MeasuredPrice:
    """Keeps batches of a run, and finds the strongest edit whose cost on them is within the price.

    Where weights are edited, and training batches can be validated, it is the edit that closes most of the gap between
    training and validation, see :mod:`~lightning_curvature.search.gap`. Otherwise a price alone limits it:
    the loss may rise above its lowest point on the path of stronger and stronger edits, that of a token by 0.02 nats,
    that of a classifier by a tenth, at most 0.05. Counted from the unedited model's it would be no limit: it falls
    where over-fitting and over-confidence go, also where classes are lost. The error of a classifier may rise by half a
    point, or one standard error, above that of the unedited model. Batches that were trained on tell no
    price: to forget them is what an edit is for.

    Attributes:
        of_updates: Whether updates are edited, since a reference or of an adapter, and not weights.
        predicted: Predicted loss of the first edit that is tried, and of the only one where nothing can be measured.
        validated: Batches of the last validation: half of them to choose on, and half to report from.
    """

    def __init__(self) -> None:
        self.of_updates, self.predicted = False, careful_budget(soft=False, of_one_layer=True)
        self.validated = Sample()

    def find(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        editor: CurvatureEditor,
        factors: KroneckerFactors,
        trained: Sample,
        others: Callable[[Sequence[Arguments]], Candidate] | None = None,
    ) -> Found | None:
        """Return the strongest edit within the price; None, which is told, if nothing can be measured. A collective.

        Args:
            trainer: The Trainer.
            module: The module; it is left as it was.
            editor: Edits it; its strength does not matter.
            factors: Its factors.
            trained: Training batches.
            others: Makes another candidate from training batches; None where the user has said what to edit.
        """
        instead = (
            f"The edit is one that is predicted to cost {self.predicted:g} nats. Measure what it does, or say what it "
            "may cost: target=, budget= or energy=."
        )
        try:
            found = self._find(trainer, module, Candidate(DEFAULT, editor, factors), trained, others)
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            rank_zero_warn(f"The price of the edit could not be measured: {type(error).__name__}: {error}. {instead}")
            found = None
        else:
            if found is None:
                reason = "validation_step computed no known loss" if self.validated else "there was no validation"
                rank_zero_info(f"The price of the edit was not measured, since {reason}. {instead}")
        self.validated.clear()
        return found

    def _find(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        default: Candidate,
        trained: Sample,
        others: Callable[[Sequence[Arguments]], Candidate] | None,
    ) -> Found | None:
        ranks = default.editor.ranks

        def measure(part: int = 0) -> Costs:
            return _costs(self.validated.read(trainer, module, ranks, part))

        first = self.validated.read(trainer, module, ranks, 0)
        if not first:
            return None
        found = None
        if others is not None and not self.of_updates:
            found = self._close_gap(trainer, module, default, trained, others, first)
        if found is None:
            found = Found(self._spend(module, default, measure, first), default)
        purchase, (_, editor, factors) = found
        held_out = measure(part=1)
        if not held_out or not purchase.budget:
            return found
        bought = editor.within(purchase.budget)
        bought.scale = purchase.scale
        with bought.applied(module, factors):
            after = measure(part=1)
        both = {name: (held_out[name], after[name]) for name in held_out}
        return found._replace(purchase=dataclasses.replace(purchase, held_out=both))

    def _spend(
        self,
        module: pl.LightningModule,
        default: Candidate,
        measure: Callable[[], Costs],
        first: Mapping[str, Reading],
    ) -> Purchase:
        """Return the strongest edit within a price, given what the unedited module says."""
        price, (_, editor, factors) = Price(_allowed(first), self.predicted), default
        if self.of_updates:
            return spend_on_update(editor, module, factors, measure, price, _losses, _costs(first))
        return spend(editor, module, factors, measure, price, _costs(first))

    def _close_gap(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        default: Candidate,
        trained: Sample,
        others: Callable[[Sequence[Arguments]], Candidate],
        first: Mapping[str, Reading],
    ) -> Found | None:
        """Return the edit that closes most of the gap to training batches, if any does.

        The gap is one of accuracy, or, unless every loss is one of classes, of the loss. None, which is told, if
        training batches cannot be measured; or if there is no gap.
        """
        ranks, readings = default.editor.ranks, dict(first)
        of_classes = all(reading.of_classes for reading in first.values())
        quantity = "error" if of_classes else "loss"

        def measure() -> Costs:
            # Every second batch: these move by far more than those of validation.
            (readings["training"],) = trained.read(trainer, module, ranks, 0).values()
            kept = _costs(self.validated.read(trainer, module, ranks, 0))
            return {f"training {quantity}": getattr(readings["training"], quantity), **kept}

        try:
            batches = trained.shared(ranks)
            if not batches:
                return None
            before = measure()
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            rank_zero_info(
                "Training batches could not be validated, so that nothing tells which layers recite: "
                f"{type(error).__name__}: {error}"
            )
            return None
        chance = math.hypot(*(_chance(reading) for reading in readings.values())) if of_classes else math.inf
        candidates = [default]
        try:
            # Curvature protects what it comes from; a text holds what is to be forgotten, and a label is one of many.
            candidates.append(others(batches if of_classes else self.validated.shared(ranks)))
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            rank_zero_info(f"Other layers than the default ones are not tried: {type(error).__name__}: {error}")

        def gap(costs: Costs) -> float:
            kept = [costs[f"{name} {quantity}"] for name in first]
            return sum(kept) / len(kept) - costs[f"training {quantity}"]

        tried, best = choose(candidates, module, measure, before, gap, _allowed_of_gap(first, of_classes))
        rank_zero_info(f"\nWhat edits do, on training and on validation batches:\n{table(tried, before)}")
        curves = {each.candidate.name: {0.0: before, **dict(sorted(each.points.items()))} for each in tried}
        if best is None and gap(before) <= chance:
            return None  # nothing is recited, as far as these batches tell
        if best is None:
            return Found(Purchase(0.0, 0.0, before, before, {0.0: before}, name=DEFAULT, tried=curves), default)
        chosen, budget = best
        name, predicted = chosen.candidate.name, chosen.predicted[budget]
        after, points = chosen.points[budget], curves[name]
        return Found(Purchase(budget, predicted, before, after, points, name=name, tried=curves), chosen.candidate)


def _allowed_of_gap(readings: Mapping[str, Reading], of_classes: bool) -> dict[str, tuple[float, bool]]:
    """Return how far each cost may rise while the gap is closed, see :func:`_allowed`."""
    priced = _allowed(readings)
    if not of_classes:
        return priced
    allowed = {f"{name} error": (priced[f"{name} error"][0], True) for name in readings}
    # Accuracy and loss disagree on over-confident models: the loss may not rise by a tenth.
    return allowed | {
        f"{name} loss": (LOSS_SHARE_OF_CLASSES * reading.loss, False) for name, reading in readings.items()
    }


def _allowed(readings: Mapping[str, Reading]) -> dict[str, tuple[float, bool]]:
    """Return how far each cost may rise, and whether above its lowest point, given those of the unedited model."""
    allowed = {f"{name} loss": (LOSS_RISE, True) for name in readings}
    for name, reading in readings.items():
        if reading.of_classes:
            rise = min(LOSS_RISE_OF_CLASSES, LOSS_SHARE_OF_CLASSES * reading.loss)
            allowed[f"{name} loss"] = (max(rise, 1e-6), True)
            allowed[f"{name} error"] = (max(ERROR_RISE, _chance(reading)), False)
        elif reading.squared:
            allowed[f"{name} loss"] = (max(LOSS_SHARE_OF_SQUARES * reading.loss, 1e-12), True)
    return allowed


def _chance(reading: Reading) -> float:
    """Return the standard error of an error."""
    return math.sqrt(reading.error * (1 - reading.error) / reading.positions)


def _costs(readings: Mapping[str, Reading]) -> Costs:
    costs = {f"{name} loss": reading.loss for name, reading in readings.items()}
    return costs | {f"{name} error": reading.error for name, reading in readings.items() if reading.of_classes}


def _losses(costs: Costs) -> float:
    return sum(cost for name, cost in costs.items() if name.endswith("loss"))
