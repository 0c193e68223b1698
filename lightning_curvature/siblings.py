"""The edited copy of a checkpoint: which weights it belongs to, and when there is none."""

from collections.abc import Mapping

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_curvature.checkpoints import archive
from lightning_curvature.checkpoints.formats import content_hash, tensor_hash, tensor_hashes
from lightning_curvature.checkpoints.lightning import Checkpoint
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.editor import WeightEditor
from lightning_curvature.factors import KroneckerFactors


def edited_copy(
    checkpoint: Checkpoint,
    editor: WeightEditor,
    factors: KroneckerFactors,
    validated: Mapping[str, str] | None,
    averages: bool,
) -> Checkpoint | None:
    """Return the edited copy of a Lightning checkpoint; None, with a warning, if there is none that is right.

    Args:
        checkpoint: What Lightning saves.
        editor: Edits it.
        factors: Factors of its weights, or of those shortly before.
        validated: Hashes of the weights that the factors are exact for, by layer; None where they move.
        averages: Whether a callback saves averaged weights, which older factors do not describe.
    """
    step = checkpoint["global_step"]
    weights = {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, torch.Tensor)}
    try:
        names = match_layers(editor.plan(factors), weights)
        if validated is not None and not all(tensor_hash(weights[k]) == validated.get(n) for n, k in names.items()):
            _warn_of_other_weights(step, factors.provenance.get("step"), averages)
            if averages:
                return None
        # The edit goes by the module's names, and reaches whatever shares memory with a weight.
        renamed = {f"{layer}.weight": weights[key] for layer, key in names.items()}
        edited, _ = editor.edit_state_dict({**weights, **renamed}, factors)
    except ValueError as error:
        rank_zero_warn(f"The checkpoint of step {step} has no edited copy: {error}")
        return None
    state_dict = {key: edited.get(key, value) for key, value in checkpoint["state_dict"].items()}
    facts = editor.facts(factors, content_hash(tensor_hashes(weights, weights.__getitem__)))
    return {**checkpoint, "state_dict": state_dict, archive.KEY: facts}


def _warn_of_other_weights(step: int, measured: int | None, averages: bool) -> None:
    rank_zero_warn(
        f"A checkpoint of step {step} was saved, and the factors are those of the validation at step {measured}: "
        + ("the weights were averaged further since, and it has no edited copy. Let WeightAveraging update them "
           "by step, or save checkpoints when validation ends (save_on_train_epoch_end=False)."
           if averages else
           "its edit rests on older weights. Save checkpoints after validation (ModelCheckpoint's default) to have "
           "exact ones.")
    )  # fmt: skip


def check_averaging(own: Callback, callbacks: list[Callback], collects_in_validation: bool) -> bool:
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
