"""Trainers in which a collection is refused: their strategies, and other callbacks."""

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
