"""The callback without its life cycle: its results, what it saves beside a checkpoint, and its copies."""

import copy
import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.batch_norm import Recalibration
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import layer_weights
from lightning_curvature.recording.step import Step
from lightning_curvature.search.energy import Match
from lightning_curvature.search.gap import Candidate
from lightning_curvature.search.price import Purchase
from lightning_curvature.trainer.arguments import CallbackArguments
from lightning_curvature.trainer.durations import check_time
from lightning_curvature.trainer.edited_copy import LaterCopy
from lightning_curvature.trainer.outcome import Outcome
from lightning_curvature.trainer.price import MeasuredPrice
from lightning_curvature.trainer.probes import Probes
from lightning_curvature.trainer.problems import Problems
from lightning_curvature.trainer.run import CollectedRun, no_data_message
from lightning_curvature.trainer.samples import Arguments
from lightning_curvature.trainer.siblings import CheckpointDict, CopyMaker, Siblings
from lightning_curvature.trainer.training_batches import TrainingBatches
from lightning_curvature.trainer.validated import validated_factors


class CallbackBase(CallbackArguments):
    """Results of :class:`~lightning_curvature.KFACEditCallback`, and its copies.

    Attributes:
        run: What the latest run collected; None before the first batch.
    """

    @override
    def _start_anew(self, factors: KroneckerFactors) -> None:
        prefix = "curvature" if self.name == "edited" else f"curvature-{self.name}"
        self._outcome = Outcome(self.editor, self.target, self.probes, prefix, self.price)
        self._problems = Problems()
        self._factors, self._validated = factors, KroneckerFactors()
        self._start: dict[str, Tensor] | None = None
        self.run: CollectedRun | None = None
        self._step: Step | None = None
        self._prepared: CollectedRun | None = None
        self._awaits_batch = self._collects_in_validation = self._in_fit = self._saves_averages = False
        self._is_settled = self._is_fitted = False
        self._siblings: Siblings | None = None
        self._module: pl.LightningModule | None = None
        self._validation_hooks, self._inference_mode_kept = ExitStack(), ExitStack()
        self._training = TrainingBatches()
        self._recalibration: Recalibration | None = None

    @property
    def factors(self) -> KroneckerFactors:
        """The factors of the latest complete window, or of all steps so far; empty before the first batch.

        Behind a fit whose update is edited at a measured price, those of the last validation (see ``loop``).

        With several processes, as of the latest checkpoint, or end of a validation or of fit: they are added up there.
        """
        if self._validated:
            return self._validated
        return self._factors if self.run is None else self.run.windows.factors

    @property
    def report(self) -> EditReport | None:
        """What an edit of the weights at the end of the latest run does; None before."""
        return self._outcome.report

    @property
    def match(self) -> Match | Purchase | None:
        """The energy that was found for ``target``, or the budget that the measured price allows; None before."""
        return self._outcome.match

    @property
    def probe_results(self) -> dict[str, float]:
        """The latest results of the probes, as they are logged."""
        return self._outcome.probe_results

    @property
    def is_recording(self) -> bool:
        """Whether a training step is being recorded."""
        return self._step is not None and self._step.is_open

    @property
    def problem(self) -> str | None:
        """Why the callback stopped, or collected nothing from a step, in the latest run; None if all went well."""
        return self._problems.first

    def _abort_step(self) -> None:
        """Drop the step that is being recorded, and its hooks."""
        if self._step is not None:
            self._step.abort()

    def _end_interrupted_step(self, run: CollectedRun, global_step: int) -> None:
        """Add the step in which the run failed; where sums are spread it is dropped, since others may be gone."""
        if self._step is not None and self._step.holds_gradients and not run.collector.is_sharded:
            self._step.close()
            run.windows.end_step(global_step)

    def _have_factors(self) -> bool:
        """Tell whether there are factors to edit with, given or collected, and add up the latter. A collective."""
        run = self.run
        if self.factors_file is not None or run is None:
            return bool(self._factors)
        # After a fit they are known; its other processes need not be here.
        return bool(run.windows.factors if run.is_fitted else run.windows.synchronise())

    def _end_validation(self, trainer: pl.Trainer) -> None:
        """Take the factors of a validation that ends."""
        run = self._running()
        run.collector.drain()  # first of all: others may still add batches
        if self._has_stopped():
            return
        step = trainer.global_step
        if not self._in_fit and trainer.ckpt_path and self._siblings is not None:
            step = self._siblings.loaded_step if self._siblings.loaded_step is not None else step
        silent = run.end_validation(step)
        self._outcome.tell_silent(silent, run.collector.network.frozen, may_fail=self._in_fit)

    def _unsettle(self) -> None:
        """Forget what was decided to be edited, since another run begins."""
        self._is_settled = False
        if self._finds_reference:
            self.keeps_start, self.editor.reference = False, None

    @abstractmethod
    def _take_factors(self, module: pl.LightningModule, at_start: bool = True) -> None:
        """Take the factors of a file, if one is given, under the names of the module; see :func:`.given_factors`."""

    def _end_collection(self, module: pl.LightningModule) -> bool:
        """End what a fit collects, and tell whether there are factors of it, or given ones. A collective."""
        if self.factors_file is not None:
            if self._has_stopped():
                return False
            if not self._factors:  # a lazy module
                self._take_factors(module, at_start=False)
            return bool(self._factors)
        run, nothing = self.run, "validation ran" if self.loop == "validation" else "training step ran a backward pass"
        if run is None and not self._problems.given_up:
            rank_zero_warn(no_data_message(nothing))
        if run is None or self._awaits_batch:
            return False
        run.collector.drain()
        if self._has_stopped():
            return False
        run.is_fitted = bool(run.windows.synchronise())
        if not run.is_fitted:
            rank_zero_warn(no_data_message(nothing))
        return run.is_fitted

    def _take_validated(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Let factors of validation batches take the place of those of training steps, where updates are edited."""
        price, run = self.price, self.run
        if self.loop != "auto" or price is None or not price.of_updates or run is None or run.collector.is_sharded:
            return
        if not (batches := price.validated.shared(self.editor.ranks)):
            return
        layers = list(run.windows.factors)
        try:
            self._validated = validated_factors(trainer, module, batches, self.options, layers, self.editor)
        except Exception as error:  # noqa: BLE001  # of code that is the user's
            rank_zero_info(
                "The edit uses factors of training steps, which protect what it is to remove, too: validation batches "
                f"gave none. {type(error).__name__}: {error}"
            )

    def _spend(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the edit that the price allows, and take the factors that it needs. A collective."""
        factors = self.factors
        self._recalibration = self._training.recalibration(trainer, module, self.editor.ranks)
        self.editor.recalibration = self._recalibration
        sample, others = self._training.sample, self._all_layers(trainer, module)
        needed = self._outcome.spend(trainer, module, factors, sample, others)
        if needed is not None and needed is not factors:
            self._validated = needed

    def _keep_batch(self, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep a copy of a training batch, where there is use for it."""
        if not self._problems.given_up:
            recites = self.price is not None and not self.price.of_updates and self._chooses_layers
            self._training.add(module, batch, batch_idx, recites, self.recalibrate)

    def _all_layers(
        self, trainer: pl.Trainer, module: pl.LightningModule
    ) -> Callable[[Sequence[Arguments]], Candidate] | None:
        """Return what makes the soft edit of all linear layers; None where the user has said what to edit."""
        if not self._chooses_layers or self.run is None or self.run.collector.is_sharded:
            return None

        def candidate(batches: Sequence[Arguments]) -> Candidate:
            options = dataclasses.replace(self.options, layers="linear")
            editor = copy.copy(self.editor)
            editor.use_soft(True)
            collected = validated_factors(trainer, module, batches, options, None, editor)
            check_time(collected, len(batches) * editor.ranks.size, trainer.fit_loop.total_batch_idx + 1)
            return Candidate("all linear layers, soft", editor, collected)

        return candidate

    def _running(self) -> CollectedRun:
        if self.run is None:
            raise RuntimeError("KFACEditCallback.setup was not called; use the callback in a Trainer.")
        return self.run

    def _make_copies(self) -> None:
        """Make the edited copies that were left for the end of the fit; say what they take."""
        if self._siblings is None:
            return
        self._siblings.waits = False
        count, factors = self._siblings.num_waiting(self.name), self.factors
        if count and factors and self._module is not None:
            self._outcome.tell_time(count, layer_weights(self._module, factors).values())
        self._siblings.make_copies(self.name)

    def _run_of_module(self) -> CollectedRun | None:
        """Return the run, if it is one of the module that Lightning's latest run is about."""
        return self.run if self.run is not None and self.run.module is self._module else None

    def _has_stopped(self) -> bool:
        """Tell whether the callback has stopped on any process. A collective."""
        return self._problems.stop_together(self.editor.ranks)

    def _saved_state(self, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
        """Return what a callback of this name has left in a checkpoint; None if there is nothing.

        The state key changes with every setting, also with those that the factors do not depend on: the name counts.
        """
        kind = type(self).__qualname__
        states = [state for key, state in checkpoint.get("callbacks", {}).items() if str(key).startswith(kind)]
        return next((state for state in states if state.get("name") == self.name), None)

    def factors_writer(self) -> Callable[[Path], None] | None:
        """Return what writes the factors to a file beside a checkpoint; None if there are none yet. A collective."""
        run = self._run_of_module()
        # Those of a run that other processes took part in cannot be had any more.
        if run is None or run.ranks is not self.editor.ranks or self._has_stopped():
            return None
        return run.factors_writer()

    def copy_maker(self, checkpoint: CheckpointDict) -> CopyMaker | None:
        """Return what makes the edited copy of a checkpoint; None, with a warning, if there is none that is right."""
        run = self._run_of_module()
        factors = KroneckerFactors() if run is None and self.factors_file is None else self.factors
        if self._has_stopped() or not (factors or self._collects_in_validation):
            return None  # which was told when it happened, or there is nothing yet
        reason: str | None = "it was saved before the first validation"
        if self._outcome.is_undecided and factors:
            reason = (
                f"it was saved before the energy for {self.target} was searched, which is done when validation ends"
            )
        elif self.factors_file is not None:
            reason = None
        elif run is not None and factors:
            reason = run.why_no_copy(checkpoint, factors, self._saves_averages, self.editor.ranks)
        if reason is not None:
            self._problems.tell_no_copy(checkpoint["global_step"], reason)
            return None
        # A price is measured when training ends, before its copies are made.
        editor = self.editor if self.price is not None else copy.copy(self.editor)
        return LaterCopy(editor, factors, self._outcome.copies, self._module, self._later)

    def _later(self) -> tuple[KroneckerFactors, Recalibration | None]:
        """Return what is known when training has ended, see :class:`LaterCopy`."""
        return self._validated, self._recalibration

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the callback holds: its settings and its results, nothing of a run that goes on."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.editor = copy.copy(self.editor)
        other.editor.ranks, other.editor.recalibration = Ranks(), None
        if self.price is not None:
            other.price = MeasuredPrice()
            other.price.of_updates, other.price.predicted = self.price.of_updates, self.price.predicted
        other.probes = Probes(self.probes.files)
        other._unsettle()
        other._start_anew(self.factors if self.editor.ranks.size == 1 else KroneckerFactors())
        other._outcome.take_over(self._outcome)
        for name in ("log", "log_dict"):  # methods of the module, which Lightning puts here
            vars(other).pop(name, None)
        return vars(other)
