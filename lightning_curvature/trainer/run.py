"""What one run of a Trainer collects, and which weights that describes."""

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from torch import nn

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import layer_weights
from lightning_curvature.recording.objectives import NothingToCollectError
from lightning_curvature.trainer.edited_copy import DescribedWeights, why_no_copy
from lightning_curvature.trainer.run_length import RunLength, batches_before
from lightning_curvature.trainer.siblings import CheckpointDict
from lightning_curvature.trainer.weight_watch import WeightWatch, weight_hashes


class CollectedRun:
    """The windows of one run, its steps as Lightning's hooks tell of them, and the weights behind its factors.

    Args:
        collector: Collects.
        windows: The factors of the run, by the collector.

    Attributes:
        is_fitted: Whether a fit has ended, whose factors stay.
        is_due: Whether the training step that runs is one to collect from.
    """

    def __init__(self, collector: Collector, windows: WindowedFactors) -> None:
        self.collector = collector
        self.windows = windows
        self.is_fitted = self.is_due = False
        self._length = RunLength()
        self._weights = WeightWatch(collector.network.weights)
        self._validated: dict[str, str] | None = None
        self._validated_others = False

    @property
    def module(self) -> nn.Module:
        """The module that is collected from."""
        return self.collector.network.module

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.collector.ranks

    def begin_step(self, trainer: pl.Trainer, collects: bool) -> None:
        """Note that a training step begins.

        Args:
            trainer: The Trainer.
            collects: Whether training steps are collected from, and not validation alone.
        """
        self._weights.begin_step()
        if collects:
            last = self._length.last_batch(trainer)
            self.is_due = self.windows.is_due(batches_before(trainer), last)

    def end_step(self) -> None:
        """Note that a training step has ended, and how it leaves the weights."""
        self.is_due = False
        self._weights.end_step()

    def end_validation(self, step: int) -> list[str]:
        """Take the factors of a validation that ends; they are exact for the weights that it ran on. A collective.

        Args:
            step: Optimizer steps behind these weights.

        Returns:
            Chosen layers that never ran.

        Raises:
            NothingToCollectError: If nothing was collected.
        """
        self.collector.provenance |= {"loop": "validation", "step": step}
        silent = self.windows.silent
        self.windows.start(complete=True)
        factors = self.windows.synchronise()
        if not factors:
            raise NothingToCollectError(no_data_message("validation step computed a loss"))
        self._validated = weight_hashes(layer_weights(self.module, factors))
        self._validated_others = self._weights.swapped()
        return silent

    def why_no_copy(
        self, checkpoint: CheckpointDict, factors: KroneckerFactors, averages: bool, ranks: Ranks
    ) -> str | None:
        """Return why a checkpoint has no edited copy that is right; None if it has one. A collective.

        Args:
            checkpoint: What Lightning saves.
            factors: The factors of the run.
            averages: Whether a ``WeightAveraging`` saves its averages.
            ranks: The processes that save it; those of the run may be gone.
        """
        measured = DescribedWeights(
            live=lambda: layer_weights(self.module, factors),
            validated=self._validated,
            step=factors.provenance.get("step"),
            swapped=self._validated_others or self._weights.swapped(),
            averages=averages,
        )
        try:
            return why_no_copy(checkpoint, factors, measured, ranks)
        except ValueError as error:
            return str(error).rstrip(".")

    def factors_writer(self) -> Callable[[Path], None] | None:
        """Return what writes the factors and the collection's state; None if there are none yet. A collective."""
        snapshot = self.windows.snapshot()
        return None if snapshot is None else lambda path: snapshot[0].save(path, snapshot[1])


def no_data_message(what: str) -> str:
    """Return what is said where a run collected nothing, given what never happened in it."""
    return (
        f"KFACEditCallback collected no data: no {what}, or every batch held NaN or infinite values. "
        "There is no edited checkpoint."
    )
