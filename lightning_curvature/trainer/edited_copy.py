"""The edited copy of a checkpoint: which weights it belongs to, and when there is none."""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_curvature.checkpoints.facts import ENTRY
from lightning_curvature.checkpoints.names import match_layers
from lightning_curvature.distributed import Ranks, whole
from lightning_curvature.editing.adapters import find_adapters
from lightning_curvature.editing.batch_norm import Recalibration, batch_norms, estimate
from lightning_curvature.editing.reference import BASE
from lightning_curvature.editing.report import EditReport
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.ties import named_tensors, tied_names
from lightning_curvature.storage.hashes import content_hash, tensor_hashes
from lightning_curvature.trainer.siblings import CheckpointDict, CopyMaker
from lightning_curvature.trainer.weight_watch import weight_hashes


@dataclass(frozen=True)
class DescribedWeights:
    """The weights that some factors describe.

    Args:
        live: Returns the weights that the module has now, by layer.
        validated: Hashes of the weights that the factors are exact for; None for factors of training steps, during
            which weights move.
        step: Step of the factors.
        swapped: Whether others than those of the last training step were validated, or lie in the module now.
        averages: Whether a ``WeightAveraging`` saves its averages, which move on after a validation.
    """

    live: Callable[[], Mapping[str, Tensor]]
    validated: Mapping[str, str] | None
    step: int | None
    swapped: bool = False
    averages: bool = False


def why_no_copy(
    checkpoint: CheckpointDict, factors: KroneckerFactors, measured: DescribedWeights, ranks: Ranks
) -> str | None:
    """Return why a checkpoint holds other weights than those that were measured; None if it does not. A collective.

    Whoever puts averaged or other weights into a checkpoint is noticed by the weights themselves. Factors of training
    steps belong to weights that move on; those of a validation are exact, and a checkpoint that is saved later gets the
    edit with a warning.

    Args:
        checkpoint: What Lightning saves.
        factors: The factors.
        measured: The weights that they describe.
        ranks: The processes.

    Raises:
        ValueError: If the checkpoint lacks a layer.
    """
    saved = _layer_tensors(checkpoint, factors, ranks)
    hashes = ranks.gather(weight_hashes(saved))[0]
    if measured.validated is not None and not hashes.items() - measured.validated.items():
        return None
    if measured.validated is not None and measured.averages:
        return (
            f"the factors are those of the validation at step {measured.step}: the weights were averaged further "
            "since, and it has no edited copy. Let WeightAveraging update them by step, or save checkpoints when "
            "validation ends (save_on_train_epoch_end=False)"
        )
    live = {name: whole(weight.detach()).to(saved[name].dtype) for name, weight in measured.live().items()}
    same = not hashes.items() - ranks.gather(weight_hashes(live))[0].items()
    if same and not any(ranks.gather(measured.swapped)):
        if measured.validated is not None:
            rank_zero_warn(
                f"A checkpoint of step {checkpoint['global_step']} was saved, and the factors are those of the "
                f"validation at step {measured.step}: its edit rests on older weights. Save checkpoints after "
                "validation (ModelCheckpoint's default) to have exact ones."
            )
        return None
    where = "validated" if measured.validated is not None else "trained"
    return (
        f"it holds other weights than those that were {where} (step {measured.step}): a callback or hook puts others "
        "in their place, averaged ones for example, which these factors do not describe. Collect in a validation of "
        "the weights that are saved (loop='validation'), or "
        "over the saved checkpoint afterwards (Trainer.validate)"
    )


def edited_copy(
    checkpoint: CheckpointDict, editor: WeightEditor, factors: KroneckerFactors, module: nn.Module | None = None
) -> tuple[CheckpointDict, EditReport]:
    """Return the edited copy of a Lightning checkpoint, and what was done.

    A collective: the processes share the work. A strategy gives the weights to all of them, to the first one alone, or
    their shards to each; the copy's weights are given in the same way.

    Args:
        checkpoint: What Lightning saves.
        editor: Edits it.
        factors: Factors of its weights, or of those shortly before.
        module: The module that was saved: its active LoRA adapters, if it has any, are edited in place of their base.

    Raises:
        ValueError: If it cannot be edited.
    """
    ranks, weights = editor.ranks, _tensors(checkpoint)
    energies = editor.energies(factors)
    adapted = None if module is None else find_adapters(module, energies)
    layers = _layer_tensors(checkpoint, dict.fromkeys(energies if adapted is None else adapted.modules), ranks)
    # The edit goes by the module's names, and reaches whatever shares memory with a weight.
    renamed = {f"{name}.weight": weight for name, weight in layers.items()}
    edited, report = editor.edit_state_dict({**weights, **renamed}, factors, module=module)
    if editor.recalibration is not None and module is not None and not report.changes_nothing:
        statistics = _statistics(edited, module, editor.recalibration, ranks)
        report = dataclasses.replace(report, norms=len(batch_norms(module)), renewed=len(statistics) // 2)
        live = named_tensors(module)
        tied = tied_names({name: live[name] for name in statistics}, live)  # a module may have two names
        edited |= {key: value for name, value in statistics.items() for key in tied[name] if key in edited}
    state_dict = {key: edited.get(key, value) for key, value in checkpoint["state_dict"].items()}
    if any(hasattr(weight, "full_tensor") for weight in weights.values()):
        hashes = weight_hashes(weights)
    else:
        hashes = tensor_hashes(weights, weights.__getitem__) if ranks.rank == 0 else {}
    edited_by = editor if adapted is None else editor.based_on(BASE, editor.scale)
    facts = edited_by.facts(factors, content_hash(hashes), report)
    return {**checkpoint, "state_dict": state_dict, ENTRY: facts}, report


def _statistics(
    weights: Mapping[str, Tensor], module: nn.Module, recalibration: Recalibration, ranks: Ranks
) -> dict[str, Tensor]:
    """Return the statistics of a module's batch norms for other weights than it has. A collective.

    Args:
        weights: The weights by name, on the first process at least.
        module: The module; it is left as it was.
        recalibration: How they are estimated.
        ranks: The processes.
    """
    live = named_tensors(module)
    if any(hasattr(tensor, "full_tensor") for tensor in live.values()):
        return {}
    known = ranks.first(lambda: [name for name in live if name in weights])
    with torch.no_grad(), ExitStack() as stack:
        for name in known:
            other = ranks.send(weights.get(name), 0)
            if not torch.equal(other.to(live[name].device), live[name]):
                stack.callback(live[name].copy_, live[name].clone())
                live[name].copy_(other)
        return estimate(module, recalibration, ranks)


class LaterCopy:
    """Makes the edited copy of one checkpoint, with the factors and the energy of the time at which it was saved.

    A price is measured when training ends, and may be measured with other factors, which are used then.

    Args:
        editor: Edits it.
        factors: Factors of its weights.
        reports: Receives what was done, by the path of the copy.
        module: The module that was saved, see :func:`edited_copy`.
        later: Returns what is known when training has ended: factors to use in the place of those, if there are any,
            and how statistics of batch norms are estimated anew.
    """

    def __init__(
        self,
        editor: WeightEditor,
        factors: KroneckerFactors,
        reports: dict[str, EditReport],
        module: nn.Module | None = None,
        later: Callable[[], tuple[KroneckerFactors, Recalibration | None]] = lambda: (KroneckerFactors(), None),
    ) -> None:
        self._editor, self._module, self._later = editor, module, later
        self._factors: KroneckerFactors | Path = factors
        self._reports = reports

    def __call__(self, checkpoint: CheckpointDict, path: str) -> CheckpointDict | None:
        """Return the copy of a checkpoint, given its path; None, with a warning, if there is none. A collective."""
        try:
            validated, recalibration = self._later()
            held = validated or self._factors
            factors = KroneckerFactors.load(held) if isinstance(held, Path) else held
            copy, self._reports[path] = edited_copy(
                checkpoint, self._editor.recalibrating(recalibration), factors, self._module
            )
        except ValueError as error:
            rank_zero_warn(f"The checkpoint of step {checkpoint['global_step']} has no edited copy: {error}")
            return None
        return copy

    def has_same_factors(self, other: CopyMaker) -> bool:
        """Tell whether another edit takes the same factors."""
        return isinstance(other, LaterCopy) and self._factors is other._factors

    def let_go(self, file: Path) -> None:
        """Hold the factors no longer: they are read from a file when they are needed."""
        self._factors = file


def _tensors(checkpoint: CheckpointDict) -> dict[str, Tensor]:
    return {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, Tensor)}


def _layer_tensors(checkpoint: CheckpointDict, names: Mapping[str, Any], ranks: Ranks) -> dict[str, Tensor]:
    """Return the saved weights of layers on all processes, spread as they are. A collective."""
    weights = _tensors(checkpoint)
    keys = ranks.first(lambda: match_layers(names, weights))
    everywhere = all(ranks.gather(bool(weights)))
    return {name: weights[key] if everywhere else ranks.send(weights.get(key), 0) for name, key in keys.items()}
