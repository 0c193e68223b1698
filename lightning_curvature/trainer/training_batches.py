"""The training batches that a run keeps: they tell what is recited, and renew the statistics of batch norms."""

from inspect import Parameter, signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.batch_norm import Recalibration, batch_norms, estimate
from lightning_curvature.trainer.samples import Sample, run_again


class TrainingBatches:
    """Copies of the first batches of the latest epoch, and which batch norms learned their statistics in it.

    Attributes:
        sample: The batches.
    """

    def __init__(self) -> None:
        self.sample = Sample()
        self._norms: set[str] = set()
        self._can_copy = True

    def clear(self) -> None:
        """Forget everything, since another run begins."""
        self.sample.clear()
        self._norms.clear()
        self._can_copy = True

    def add(self, module: pl.LightningModule, batch: Any, batch_idx: int, recites: bool, recalibrate: bool) -> None:
        """Keep a copy of a batch, if it is one of the first of its epoch and there is use for it.

        Args:
            module: The module, in the mode in which it trains.
            batch: The batch.
            batch_idx: Its number in the epoch.
            recites: Whether it helps to tell what is recited.
            recalibrate: Whether it renews statistics of batch norms, if there are any.
        """
        if not self._can_copy:  # on this process: others go on, and learn at the end that there is nothing
            return
        if batch_idx == 0 or not self.sample:
            self.sample.clear()
            self._norms = set(batch_norms(module)) if recalibrate else set()
        if self._norms:  # those that are frozen when steps begin, or after the first one, stay
            modules = dict(module.named_modules())
            self._norms = {name for name in self._norms if modules[name].training}
        if not recites and not self._norms:
            return
        needed = signature(module.validation_step).parameters.get("dataloader_idx")
        is_needed = needed is not None and needed.default is Parameter.empty
        try:
            self.sample.add(module, batch, batch_idx, num_loaders=2 if is_needed else 1)
        except Exception as error:  # noqa: BLE001  # of batches that are the user's
            self._can_copy = False
            self.sample.clear()
            rank_zero_info(f"Training batches cannot be copied, so that they do not tell what recites: {error}")

    def recalibration(self, trainer: pl.Trainer, module: pl.LightningModule, ranks: Ranks) -> Recalibration | None:
        """Return what estimates statistics of batch norms anew. A collective.

        None, if there are no batch norms, or, which is told, if training batches cannot be validated.
        """
        if any(hasattr(weight, "full_tensor") for weight in module.parameters()):
            return None  # copies of sharded modules keep their statistics, so nothing is measured with others
        norms = set.intersection(*map(set, ranks.gather(self._norms)))
        batches = self.sample.shared(ranks) if norms else []
        if not batches:
            return None

        def run() -> None:
            ranks.together(lambda: run_again(trainer, module, batches, module.validation_step))

        found, problem = {}, "none of them runs in validation_step"
        try:
            found = estimate(module, Recalibration(run, norms), ranks)
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            problem = f"training batches could not be validated: {type(error).__name__}: {error}"
        if not found:
            rank_zero_warn(
                f"The statistics of batch norms ({len(norms)}) stay those of the unedited weights, since {problem}. "
                "Estimate them anew on training data: torch.optim.swa_utils.update_bn(loader, model)."
            )
            return None
        return Recalibration(run, {name.rpartition(".")[0] for name in found})
