"""The last window of a run is one of its end, however the run is told when to end."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, Timer
from torch.utils.data import DataLoader, IterableDataset

from lightning_curvature import KFACEditCallback
from lightning_curvature.trainer.run_length import RunLength
from tests.support.rows import Plain, fit, loader, rows


class TwoOptimizers(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 2)]


class OwnAccumulation(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if (batch_idx + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Stream(IterableDataset):
    """Batches of unknown number."""

    def __iter__(self):
        return iter(rows(16 * 40))


class Growing(pl.LightningDataModule):
    """Each epoch has ten batches more than the one before."""

    def train_dataloader(self):
        return loader(16 * 10 * (self.trainer.current_epoch + 1))


CASES = {
    "steps": (Plain, {}, {"max_steps": 150, "max_epochs": -1}),
    "two optimizers": (TwoOptimizers, {}, {"max_steps": 300, "max_epochs": -1}),
    "own accumulation": (OwnAccumulation, {}, {"max_steps": 40, "max_epochs": -1}),
    "accumulation": (Plain, {}, {"max_steps": 40, "max_epochs": -1, "accumulate_grad_batches": 4}),
    "a schedule": (
        Plain,
        {"callbacks": [GradientAccumulationScheduler({0: 4, 1: 1})]},
        {"max_steps": 120, "max_epochs": -1},
    ),
    "a stream": (Plain, {"data": DataLoader(Stream(), 16)}, {"max_epochs": 4}),
    "a loader that grows": (Plain, {"data": Growing()}, {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 1}),
    "part of a loader": (Plain, {}, {"max_epochs": 3, "limit_train_batches": 55}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_window_is_one_of_the_end(case, tmp_path):
    kind, given, options = CASES[case]
    callback = KFACEditCallback(window=160, layers=["net.0"])  # ten batches
    seen = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.global_step)

    fit(
        tmp_path,
        kind(),
        callback,
        *given.get("callbacks", []),
        Count(),
        data=given.get("data", loader(16 * 80)),
        enable_checkpointing=False,
        **options,
    )
    collected = callback.factors.provenance["step"]
    last = max(index for index, step in enumerate(seen) if step <= collected)
    assert len(seen) - 1 - last <= 6, (collected, seen[-1], len(seen))


def test_the_length_of_a_run_that_a_clock_ends():
    class Clock(Timer):
        elapsed = 0.0

        def time_elapsed(self, stage="train"):
            return self.elapsed

        def time_remaining(self, stage="train"):
            return 100.0 - self.elapsed

    clock, length = Clock(), RunLength(span=4)
    trainer = pl.Trainer(callbacks=[clock], logger=False, enable_checkpointing=False, max_epochs=-1, accelerator="cpu")
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for batch in range(12):
        progress.total.processed, clock.elapsed = batch, 2.0 * batch
        last = length.last_batch(trainer)
    assert last == 11 + 39 - 1  # 78 seconds are left, two for each batch
