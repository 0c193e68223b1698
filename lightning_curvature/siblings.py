"""The edited copy of a checkpoint: which weights it belongs to, and when there is none."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_curvature.checkpoints import archive
from lightning_curvature.checkpoints.formats import content_hash, tensor_hash, tensor_hashes
from lightning_curvature.checkpoints.lightning import Checkpoint
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.editing import WeightEditor
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.ranks import whole


def edited_copy(
    checkpoint: Checkpoint,
    editor: WeightEditor,
    factors: KroneckerFactors,
    validated: Mapping[str, str] | None,
    averages: bool,
) -> Checkpoint | None:
    """Return the edited copy of a Lightning checkpoint; None, with a warning, if there is none that is right.

    A collective: the processes share the work. A strategy gives the weights to all of them, to the first one alone, or
    their shards to each; the copy's weights are given in the same way.

    Args:
        checkpoint: What Lightning saves.
        editor: Edits it.
        factors: Factors of its weights, or of those shortly before.
        validated: Hashes of the weights that the factors are exact for, by layer; None where they move.
        averages: Whether a callback saves averaged weights, which older factors do not describe.
    """
    step, ranks = checkpoint["global_step"], editor.ranks
    weights = {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, torch.Tensor)}
    try:
        names = ranks.first(lambda: match_layers(editor.plan(factors), weights))
        everywhere = all(ranks.gather(bool(weights)))
        layers = {name: weights[key] if everywhere else ranks.send(weights.get(key), 0) for name, key in names.items()}
        if validated is not None and ranks.gather(weight_hashes(layers))[0].items() - validated.items():
            _warn_of_other_weights(step, factors.provenance.get("step"), averages)
            if averages:
                return None
        # The edit goes by the module's names, and reaches whatever shares memory with a weight.
        renamed = {f"{name}.weight": weight for name, weight in layers.items()}
        edited, report = editor.edit_state_dict({**weights, **renamed}, factors)
    except ValueError as error:
        rank_zero_warn(f"The checkpoint of step {step} has no edited copy: {error}")
        return None
    state_dict = {key: edited.get(key, value) for key, value in checkpoint["state_dict"].items()}
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        hashes = weight_hashes(weights)
    else:
        hashes = tensor_hashes(weights, weights.__getitem__) if ranks.rank == 0 else {}
    facts = editor.facts(factors, content_hash(hashes))
    if report.skipped:
        facts["layers"] = {name: facts["layers"][name] for name in report.layers}
        facts["skipped"] = dict(report.skipped)
    return {**checkpoint, "state_dict": state_dict, archive.KEY: facts}


def weight_hashes(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return the hash of each weight, gathered where it is spread over processes. A collective."""
    return {name: tensor_hash(whole(weight.detach())) for name, weight in weights.items()}


def _warn_of_other_weights(step: int, measured: int | None, averages: bool) -> None:
    rank_zero_warn(
        f"A checkpoint of step {step} was saved, and the factors are those of the validation at step {measured}: "
        + ("the weights were averaged further since, and it has no edited copy. Let WeightAveraging update them "
           "by step, or save checkpoints when validation ends (save_on_train_epoch_end=False)."
           if averages else
           "its edit rests on older weights. Save checkpoints after validation (ModelCheckpoint's default) to have "
           "exact ones.")
    )  # fmt: skip
