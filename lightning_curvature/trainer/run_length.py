"""How many training batches a fit still has."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Timer


def batches_before(trainer: pl.Trainer) -> int:
    """Return how many training batches a fit has run before this one; also if it was interrupted and goes on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


class RunLength:
    """How many training batches a fit still has, worked out anew at each batch.

    What ends a run may be counted in epochs, in optimizer steps (of several optimizers, or of accumulated batches, also
    where a module accumulates by itself), or in time. Steps for each batch are those of the latest batches, and an
    epoch of unknown length is taken for as long as the one before.

    Args:
        span: Batches over which steps and time are counted, and twice as many at most.
    """

    def __init__(self, span: int = 8) -> None:
        self.span = span
        self._marks: list[tuple[int, int, float]] = []  # batches, optimizer steps and seconds so far
        self._epoch, self._index = -1, 0
        self._previous = math.inf

    def last_batch(self, trainer: pl.Trainer) -> float:
        """Return the number of the last training batch of a fit, from 0; infinite if nothing tells it.

        Call it at the beginning of each training batch.
        """
        batches, timers = batches_before(trainer), _timers(trainer)
        seconds = timers[0].time_elapsed() if timers else 0.0
        if trainer.current_epoch != self._epoch >= 0:
            self._previous = float(self._index + 1)
        self._epoch, self._index = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
        now = (batches, trainer.global_step, seconds)
        if not self._marks or batches - self._marks[-1][0] >= self.span:
            self._marks = [*self._marks[-1:], now]
        left = [self._left_by_epochs(trainer), self._left_by_steps(trainer, now)]
        for timer in timers:
            left.append(self._left_by_rate(now, 2, timer.time_remaining()))
        return batches + min(left) - 1

    def _left_by_epochs(self, trainer: pl.Trainer) -> float:
        epochs = trainer.max_epochs
        known = float(trainer.num_training_batches)
        length = known if math.isfinite(known) else self._previous
        if epochs is None or epochs < 0 or not math.isfinite(length):
            return math.inf
        return max(length - self._index, 1.0) + (epochs - 1 - trainer.current_epoch) * length

    def _left_by_steps(self, trainer: pl.Trainer, now: tuple[int, int, float]) -> float:
        if trainer.max_steps < 0:
            return math.inf
        steps = trainer.max_steps - trainer.global_step
        if now[0] == self._marks[0][0]:
            return float(steps * trainer.accumulate_grad_batches)
        return self._left_by_rate(now, 1, steps)

    def _left_by_rate(self, now: tuple[int, int, float], which: int, rest: float | None) -> float:
        """Return the batches in which a quantity grows by ``rest``, as it did over the latest ones."""
        first = self._marks[0]
        grown = now[which] - first[which]
        if rest is None or grown <= 0 or now[0] == first[0]:
            return math.inf
        return math.ceil(rest * (now[0] - first[0]) / grown)


def _timers(trainer: pl.Trainer) -> list[Timer]:
    """Return the callbacks that end a run after some time, ``max_time`` among them."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if isinstance(c, Timer) and c.time_remaining() is not None]
