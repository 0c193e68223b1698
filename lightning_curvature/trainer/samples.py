"""What the losses of a module say on batches that its steps run on again."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch.overrides import TorchFunctionMode

from lightning_curvature.collect.validation_step import CollectedStep
from lightning_curvature.distributed import Ranks
from lightning_curvature.layers.modules import evaluating
from lightning_curvature.recording.compiled import uncompiled
from lightning_curvature.recording.entry_losses import ENTRY_LOSSES, entry_facts
from lightning_curvature.recording.losses import SOFTMAX_LOSSES, softmax_facts
from lightning_curvature.trainer.measuring import random_state_kept
from lightning_curvature.trainer.replay import without_trace

Arguments = tuple[Any, ...]
BATCHES, BYTES = 32, 2**28
"""Batches of each dataloader that a sample keeps, and bytes of all."""


class Reading(NamedTuple):
    """What the losses of some batches say, summed over loss positions.

    Args:
        nll: Negative log-likelihoods of the targets, in nats; half the squared errors.
        wrong: Loss positions whose most likely class is another than the target; of several labels the wrong share.
        positions: Number of loss positions.
        squared: Those of squared errors.
        examples: Examples of the batches.
    """

    nll: float = 0.0
    wrong: float = 0.0
    positions: int = 0
    squared: int = 0
    examples: int = 0

    @property
    def loss(self) -> float:
        """Nats per loss position; NaN without any."""
        return self.nll / self.positions if self.positions else math.nan

    @property
    def error(self) -> float:
        """Share of loss positions whose most likely class is another than the target; NaN without any."""
        return self.wrong / self.positions if self.positions else math.nan

    @property
    def of_classes(self) -> bool:
        """Whether each example has one loss position, as in classification; a text has many."""
        return self.positions <= self.examples and not self.squared


class Sample:
    """Copies of batches, on the CPU, to run validation steps on."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the batches."""
        self._batches: dict[int, list[Arguments]] = {}  # by dataloader
        self._room = BYTES

    def __bool__(self) -> bool:
        """Return whether a batch is kept."""
        return bool(self._batches)

    def add(
        self, module: pl.LightningModule, batch: Any, batch_idx: int, loader: int = 0, num_loaders: int = 1
    ) -> None:
        """Keep a copy of a batch if there is room, with the other arguments of its step."""
        kept = self._batches.setdefault(loader, [])
        if len(kept) < BATCHES and self._room > 0:
            takes_index = is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2)
            indices = [*([batch_idx] if takes_index else []), *([loader] if num_loaders > 1 else [])]
            own = copy.deepcopy(move_data_to_device(batch, torch.device("cpu")))
            kept.append((own, *indices))
            apply_to_collection(own, torch.Tensor, self._take_room)

    def _take_room(self, tensor: torch.Tensor) -> None:
        self._room -= tensor.nbytes

    def shared(self, ranks: Ranks) -> list[Arguments]:
        """Return all that is kept, as much as every process has. A collective."""
        kept = [self._batches.get(loader, []) for loader in self._loaders(ranks)]
        return [arguments for batches in kept for arguments in batches[: min(ranks.gather(len(batches)))]]

    def read(
        self, trainer: pl.Trainer, module: pl.LightningModule, ranks: Ranks, half: int | None = None
    ) -> dict[str, Reading]:
        """Return what the batches of each dataloader say, without those that have no loss. A collective.

        Args:
            trainer: The Trainer.
            module: The module; it is left as it was.
            ranks: The processes.
            half: Every second batch: 0 or 1 is the first one. None for all.
        """
        readings, taken = {}, slice(None) if half is None else slice(half, None, 2)
        for loader in self._loaders(ranks):
            reading = read_losses(trainer, module, self._batches.get(loader, [])[taken], ranks)
            if reading.positions:
                readings[f"validation {loader}" if len(self._batches) > 1 else "validation"] = reading
        return readings

    def _loaders(self, ranks: Ranks) -> list[int]:
        return sorted(set().union(*ranks.gather(set(self._batches))))


def read_losses(trainer: pl.Trainer, module: pl.LightningModule, batches: Sequence[Arguments], ranks: Ranks) -> Reading:
    """Run validation steps again, uncompiled, in eval mode, and return what their losses say. A collective.

    Args:
        trainer: The Trainer.
        module: The module; it is left as it was.
        batches: Arguments of the steps; of several processes each has its own.
        ranks: The processes.
    """
    step: Any = module.validation_step
    step = step.step if isinstance(step, CollectedStep) else step  # these batches were collected when they came
    num_batches = min(ranks.gather(len(batches)))  # a step may call collectives: all run as many
    readings = []

    def read(moved: Any, *indices: int) -> None:
        with _LossReader() as reader:
            step(moved, *indices)
        readings.append(reader.reading._replace(examples=extract_batch_size(moved)))

    ranks.together(lambda: run_again(trainer, module, batches[:num_batches], read))
    return _sum(ranks.gather(_sum(readings)))


def run_again(
    trainer: pl.Trainer, module: pl.LightningModule, batches: Sequence[Arguments], step: Callable[..., Any]
) -> None:
    """Run a step on batches of a validation again, uncompiled and in eval mode, and leave the module as it was."""
    with random_state_kept([]), evaluating(module), without_trace(trainer, module), uncompiled(object()):
        for batch, *indices in batches:
            # The hooks of a transfer have seen it. A step may change its batch, and gets a copy.
            moved = move_data_to_device(copy.deepcopy(batch), module.device)  # after a run that is the CPU
            with trainer.precision_plugin.val_step_context():
                step(moved, *indices)


def _sum(readings: Sequence[Reading]) -> Reading:
    return Reading(*(sum(values) for values in zip(*readings, strict=True)))


class _LossReader(TorchFunctionMode):
    """Reads each loss that is computed inside, by the function that computes it."""

    def __init__(self) -> None:
        super().__init__()
        self._readings: dict[bool, Reading] = {}  # by whether it is a softmax

    @property
    def reading(self) -> Reading:
        """What the softmax losses say; without one, the others: beside a softmax they are further terms."""
        return self._readings.get(True) or self._readings.get(False) or Reading()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_softmax = func in SOFTMAX_LOSSES
        if is_softmax or func in ENTRY_LOSSES:
            reading = (_reading if is_softmax else _entry_reading)(func, args, kwargs)
            self._readings[is_softmax] = _sum([self._readings.get(is_softmax, Reading()), reading])
        return func(*args, **kwargs)


def _reading(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
    facts = softmax_facts(func, args, kwargs)
    logits = facts.given["input"].detach().movedim(facts.class_dim, -1)[facts.counted].float()
    log_p = logits if func is F.nll_loss else logits.log_softmax(-1)
    target = facts.given["target"]
    if target.is_floating_point():
        probabilities = target.movedim(facts.class_dim, -1)[facts.counted]
        nll, target = -(log_p * probabilities).sum(), probabilities.argmax(-1)
    else:
        target = target[facts.counted]
        nll = -log_p.gather(-1, target[:, None]).sum()
    return Reading(float(nll), int((logits.argmax(-1) != target).sum()), len(target))


def _entry_reading(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reading:
    facts = entry_facts(func, args, kwargs)
    if facts is None:
        return Reading()
    logits, target = (part.detach().movedim(facts.class_dim, -1).float() for part in (facts.logits, facts.target))
    counted = facts.entries.any(-1)
    positions = int(counted.sum())
    if ENTRY_LOSSES[func] == "squared":
        return Reading(float(0.5 * ((logits - target).square() * facts.entries).sum()), 0.0, positions, positions)
    nll = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * facts.entries
    wrong = ((logits > 0) != (target > 0.5)) & facts.entries  # a probability
    shares = wrong.sum(-1) / facts.entries.sum(-1).clamp(min=1)
    return Reading(float(nll.sum()), float(shares.sum()), positions)
