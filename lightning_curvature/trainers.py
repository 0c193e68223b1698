"""Which Trainers a collection can run in: strategies, and other callbacks."""

import math
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from lightning_curvature.ranks import Ranks

_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)


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


def check_callbacks(own: Callback, callbacks: list[Callback], collects_in_validation: bool) -> bool:
    """Refuse callbacks that save other weights than those that are collected; tell whether averaged ones are saved.

    Args:
        own: The callback that collects; it is moved before a ``WeightAveraging`` that stands before it.
        callbacks: Those of the Trainer.
        collects_in_validation: Whether it collects there, on the averaged weights.

    Raises:
        MisconfigurationException: If the edit would not belong to what is saved.
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
        if "WeightAveraging" in kinds and callbacks.index(callback) < callbacks.index(own):
            # It takes the averaged weights out of the module when validation ends; the probes come before that.
            callbacks.remove(own)
            callbacks.insert(callbacks.index(callback), own)
    return averages


def batches_before(trainer: pl.Trainer) -> int:
    """Return how many training batches a fit has run before this one; also if it was interrupted and goes on."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


def last_batch(trainer: pl.Trainer) -> float:
    """Return the number of the last training batch of a fit, from 0; infinite if it is not known."""
    epochs = trainer.max_epochs
    batches = math.inf if epochs is None or epochs < 0 else epochs * float(trainer.num_training_batches)
    if trainer.max_steps >= 0:
        batches = min(batches, trainer.max_steps * trainer.accumulate_grad_batches)
    return batches - 1
