"""Which Trainers a collection can run in: strategies, and other callbacks; and how long a run still is."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_curvature.distributed import Ranks

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


def check_trainer(
    collecting: Callback, kind: type[Callback], trainer: pl.Trainer, collects_in_validation: bool, in_fit: bool
) -> bool:
    """Refuse a Trainer in which collecting is not possible, or an edit would not belong to what is saved.

    Args:
        collecting: The callback that collects.
        kind: Class of such callbacks.
        trainer: The Trainer, before a fit or a validation.
        collects_in_validation: Whether a fit is collected from in its validations, and not in its steps.
        in_fit: Whether a fit begins.

    Returns:
        Whether averaged weights are saved, by a ``WeightAveraging``.

    Raises:
        MisconfigurationException: If it is such a Trainer; says what to do.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    name = getattr(collecting, "name", "")
    if any(isinstance(c, kind) and c is not collecting and getattr(c, "name", "") == name for c in callbacks):
        raise MisconfigurationException(
            f"Several KFACEditCallbacks have the name {name!r}; they would write the same edited checkpoints. "
            "Give each a name=, which becomes NAME-{name}.ckpt."
        )
    check_strategy(trainer.strategy)
    return in_fit and check_callbacks(collecting, callbacks, collects_in_validation)


def check_package(trainer: Any, module: Any) -> None:
    """Refuse Trainer and module of the package ``pytorch_lightning``, whose classes are different ones.

    Raises:
        MisconfigurationException: If they are not of ``lightning``.
    """
    if not isinstance(trainer, pl.Trainer) or not isinstance(module, pl.LightningModule):
        raise MisconfigurationException(
            "KFACEditCallback works with the `lightning` package; this Trainer or LightningModule comes from "
            "`pytorch_lightning`, whose classes are different ones. Use `import lightning as L; L.Trainer(...)` "
            "and `class Model(L.LightningModule)`."
        )


def check_strategy(strategy: Strategy) -> None:
    """Refuse strategies under which layers are not what they look like from inside a module.

    Raises:
        MisconfigurationException: If it is one; says what to use.
    """
    kinds = [kind.__name__ for kind in type(strategy).__mro__]
    if isinstance(strategy, FSDPStrategy):
        raise MisconfigurationException(
            "KFACEditCallback does not work with FSDPStrategy, which allows one backward pass for each forward pass; "
            "curvature needs more. Use ModelParallelStrategy with fully_shard in configure_model (FSDP2)."
        )
    if not isinstance(strategy, _STRATEGIES) or any("DeepSpeed" in kind or "XLA" in kind for kind in kinds):
        raise MisconfigurationException(
            f"KFACEditCallback does not work with {type(strategy).__name__}, which changes what a module holds and "
            "what its backward pass does. Use DDPStrategy or ModelParallelStrategy (FSDP2, tensor parallel), or "
            "collect over the trained model with one process (Trainer.validate, lightning-curvature collect)."
        )


def check_validation(ranks: Ranks, *sources: object) -> None:
    """Refuse a validation that one process may skip while the others wait for it.

    Args:
        ranks: The processes.
        sources: The module and the datamodule.

    Raises:
        MisconfigurationException: If there are several processes, and Lightning is told to let one have no batch.
    """
    name = "allow_zero_length_dataloader_with_multiple_devices"
    if ranks.size > 1 and any(getattr(source, name, False) for source in sources):
        raise MisconfigurationException(
            f"KFACEditCallback collects in validation, and {name} is set: a process without batches would skip the "
            "validation, and the others would wait for it. Give each process a batch, or use an IterableDataset."
        )


def check_callbacks(collecting: Callback, callbacks: list[Callback], collects_in_validation: bool) -> bool:
    """Refuse callbacks that are known to save other weights than those that are collected.

    Others that do so are noticed when a checkpoint is saved.

    Args:
        collecting: The callback that collects; it is moved before a ``WeightAveraging`` that stands before it.
        callbacks: Those of the Trainer.
        collects_in_validation: Whether it collects there, on the averaged weights.

    Raises:
        MisconfigurationException: If the edit would not belong to what is saved.

    Returns:
        Whether averaged weights are saved, by a ``WeightAveraging``.
    """
    averages = False
    for callback in list(callbacks):
        kinds = {kind.__name__ for kind in type(callback).__mro__}
        if "ModelPruning" in kinds:
            raise MisconfigurationException(
                "KFACEditCallback does not work with ModelPruning: an edit would fill the weights that ModelPruning "
                "sets to zero. Prune the edited model instead."
            )
        if "StochasticWeightAveraging" in kinds or ("WeightAveraging" in kinds and not collects_in_validation):
            raise MisconfigurationException(
                f"KFACEditCallback collects the factors of the live weights, and {type(callback).__name__} leaves "
                "averaged ones: the edit would not belong to them. Use WeightAveraging with "
                "KFACEditCallback(loop='validation'), since validation runs on its averaged weights, or collect "
                "over the averaged model afterwards (Trainer.validate)."
            )
        averages |= "WeightAveraging" in kinds
        if "WeightAveraging" in kinds and callbacks.index(callback) < callbacks.index(collecting):
            # It takes the averaged weights out of the module when validation ends; the probes come before that.
            callbacks.remove(collecting)
            callbacks.insert(callbacks.index(callback), collecting)
    return averages


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
