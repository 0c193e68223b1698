"""The Lightning callback: when it collects, when it edits, what it saves and logs."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_curvature.collect.validation_step import collected_from
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import has_lazy
from lightning_curvature.layers.selection import PresetError
from lightning_curvature.trainer.problems import Problems, never_ends_a_fit
from lightning_curvature.trainer.refusals import check_package, check_trainer, check_validation
from lightning_curvature.trainer.runs import CallbackRuns
from lightning_curvature.trainer.siblings import Siblings


class KFACEditCallback(CallbackRuns):
    """Collects K-FAC factors in fit or validation, and leaves an edited sibling beside every checkpoint.

    A run with the callback is bit for bit the run without it: weights, optimizer and random state never change. Beside
    ``NAME.ckpt`` there is ``NAME-edited.ckpt``, which ``load_from_checkpoint`` loads, made when fit ends; and
    ``NAME-edited-factors.safetensors``, from which ``fit(ckpt_path=...)`` goes on collecting. The callback never ends a
    fit that runs without it: what cannot be collected or edited costs the edited copy, and a warning says why.

    ``Trainer.validate`` collects too, unless the callback holds the factors of a fit, and so does the validation inside
    fit with ``loop="validation"``. Probes, data on which the model is measured before and after the edit, are files
    (``probes``) or what a method ``probe_dataloader()`` of the module or the datamodule returns: a dict of dataloaders
    with batches ``(inputs, labels)``, ``(inputs, noised, clean)``, or dicts with ``input_ids``. Results are logged as
    ``curvature/{probe}/{metric}/before`` and ``.../after``.

    Source: arXiv:2510.24256. The defaults follow from ``benchmarks/``; see ``docs/decisions.md``. Strategies and
    precisions: ``docs/support.md``.

    Raises:
        MisconfigurationException: If the Trainer cannot be used with it.

    Example:
        >>> trainer = pl.Trainer(callbacks=[KFACEditCallback()], accelerator="cpu", logger=False)
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this Trainer can be used, and watch its checkpoints. Lightning calls it before each run.

        The factors of a run before stay until this one collects its first batch.
        """
        check_package(trainer, pl_module)
        if stage not in ("fit", "validate"):
            return
        in_fit = stage == "fit"
        if self.keeps_start and not in_fit and self._start is None:
            raise MisconfigurationException(
                "reference='start' is for a fit, whose first weights it keeps. Name the checkpoint that the model was "
                "fine-tuned from: reference=PATH."
            )
        self._saves_averages = check_trainer(
            self, KFACEditCallback, trainer, self.loop == "validation" or self.factors_file is not None, in_fit
        )
        self._in_fit, self._module, self._problems = in_fit, pl_module, Problems()
        self._siblings = Siblings.of(trainer.strategy)
        self._siblings.watch(self.name, self, in_fit=self._in_fit)
        self._training.clear()
        if in_fit or self._run_of_module() is None:
            self._recalibration = None
        self.editor.ranks, self.editor.recalibration = self._siblings.ranks, self._recalibration
        self._outcome.start()
        if in_fit:
            self._start, self._is_fitted = None, False
        if self._start is None:
            self._unsettle()
        sources = (pl_module, getattr(trainer, "datamodule", None))
        self.probes.check(self.target, sources)
        is_fitted = self.run is not None and self.run.is_fitted
        self._collects_in_validation = self.loop == "validation" if self._in_fit else not is_fitted
        self._collects_in_validation &= self.factors_file is None
        if self._collects_in_validation:
            check_validation(self.editor.ranks, *sources)
            # Inference tensors can never enter a graph, and the mode is entered before any hook of a callback runs.
            loop: Any = trainer.fit_loop.epoch_loop.val_loop if self._in_fit else trainer.validate_loop
            self._inference_mode_kept.callback(setattr, loop, "inference_mode", loop.inference_mode)
            loop.inference_mode = False
        if self.factors_file is not None:
            self.run, self._factors, self._validated = None, KroneckerFactors(), KroneckerFactors()
            self._outcome.clear()
        elif self._in_fit or self._collects_in_validation:
            self._awaits_batch, self._prepared = True, None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose layers, and check the probes. Lightning calls it when module and data are set up, before any step.

        Raises:
            ValueError: If an argument does not fit the module. A preset that has no layers in it costs a warning.
        """
        self._settle(trainer, pl_module)
        try:
            self._prepare(pl_module)
        except PresetError as error:  # the network is not one for it, which is no mistake in an argument
            self._problems.meet(error)
        except (TypeError, ValueError):
            raise
        except Exception as error:  # noqa: BLE001  # of modules that are not what their class says
            self._problems.meet(error)
        self._keep_start(trainer, pl_module)
        if not has_lazy(pl_module):  # otherwise when it has been built
            self._take_factors(pl_module)
        self.probes.check_loaders(trainer, pl_module, self.target)

    @never_ends_a_fit
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start to record the step, if it is due. Lightning calls it before each training step."""
        self._keep_batch(pl_module, batch, batch_idx)
        collects = self.loop != "validation"
        run = self._begin(pl_module) if collects else self.run
        if run is not None:
            run.begin_step(trainer, collects)
            if run.is_due and not self._problems.given_up:
                self._abort_step()
                self._step = run.collector.step(batch)
                self._step.open()

    @never_ends_a_fit
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Take the step's gradients while its graph is alive. Lightning calls it before each backward pass."""
        if self._step is not None and not self._problems.given_up:
            self._step.before_backward(loss)
            if pl_module.automatic_optimization:  # otherwise training_step is still running, and may run other passes
                self._step.stop_recording()

    @never_ends_a_fit
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch, and end the window if it is full. Lightning calls it after each training step."""
        run, step = self.run, self._step
        if run is None:
            return
        try:
            if step is not None and step.is_open:
                step.close()
                run.windows.end_step(trainer.global_step)
            elif run.is_due:
                run.collector.add_nothing()
        finally:
            run.end_step()

    @never_ends_a_fit
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop a step that was cut short; without a validation, search the energy of the target here.

        Lightning calls it after the last step of an epoch, and after the validation there.
        """
        self._abort_step()
        searches = self.target is not None and not trainer.enable_validation
        if searches and not self._has_stopped() and self._have_factors():
            self._outcome.search(trainer, pl_module, self.factors)

    @never_ends_a_fit
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the validation steps, if this is where to collect. Lightning calls it before their first one."""
        if trainer.sanity_checking or self._problems.given_up:
            return
        if self.price is not None:
            self.price.validated.clear()
        if not self._in_fit and (self._collects_in_validation or self.factors_file is not None):
            self._settle(trainer, pl_module)
            self.probes.check_loaders(trainer, pl_module, self.target)
            self._take_factors(pl_module)
        if not self._collects_in_validation:
            return
        run = self._begin(pl_module)
        if run is not None:
            run.windows.start(complete=False)
            self._validation_hooks.enter_context(collected_from(pl_module, run.collector))

    @never_ends_a_fit
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the batch to measure the price of the edit on. Lightning calls it before each validation step."""
        if self.price is not None and not trainer.sanity_checking and not self._problems.given_up:
            loop: Any = trainer.fit_loop.epoch_loop.val_loop if self._in_fit else trainer.validate_loop
            in_turn = getattr(loop, "_is_sequential", True)  # otherwise a step is not told the dataloader
            loaders = len(trainer.num_val_batches) if in_turn and trainer.num_val_batches else 1
            self.price.validated.add(pl_module, batch, batch_idx, dataloader_idx, loaders)

    @never_ends_a_fit
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the factors of this validation, and measure the probes, next to what the module logs.

        Lightning calls it after the last step of a validation, before the module's own hook.

        Raises:
            RuntimeError: In ``Trainer.validate``, if not one validation batch could be collected.
        """
        if trainer.sanity_checking:
            return
        self._validation_hooks.close()
        if self._collects_in_validation:
            self._end_validation(trainer)
        elif self._has_stopped():
            return
        if self._have_factors():
            if not self._in_fit:
                self._outcome.spend(trainer, pl_module, self.factors, self._training.sample)
            self._outcome.search(trainer, pl_module, self.factors)
            if results := self._outcome.measure(trainer, pl_module, self.factors, may_fail=self._in_fit):
                pl_module.log_dict(results)
        if not self._in_fit and (self._collects_in_validation or self.factors_file is not None):
            self._outcome.edit_live(pl_module, self.factors)
            self._outcome.show(
                "Trainer.validate writes no checkpoint. An edit of these weights would do:",
                self.factors,
                self.save_factors,
            )

    @never_ends_a_fit
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search a last time, work out what an edit does, and measure the probes. Lightning calls it after training."""
        if not self._end_collection(pl_module):
            return
        self._is_fitted = True
        self._take_validated(trainer, pl_module)
        self._spend(trainer, pl_module)
        if self.loop != "validation" and self.run is not None:
            self._outcome.tell_silent(self.run.windows.silent, self.run.collector.network.frozen, may_fail=True)
        if self.loop != "validation" or self._recalibration is not None:
            self._outcome.search(trainer, pl_module, self.factors)
            results = self._outcome.measure(trainer, pl_module, self.factors, may_fail=True)
            self._outcome.log(trainer.loggers, trainer.global_step, results)
        self._outcome.edit_live(pl_module, self.factors)

    @never_ends_a_fit
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit the checkpoints that are there, and show what was done. Lightning calls it last in a fit."""
        self._make_copies()
        if self._is_fitted and not (self._awaits_batch or self._problems.given_up):
            self._outcome.show(
                f"No checkpoint was edited. An edit of the weights at step {trainer.global_step} would do:",
                self.factors,
                self.save_factors,
            )

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Add the batch if Lightning counts it as done, since it will not run it again; then remove every hook.

        Lightning calls it when a run stops by an error or a signal.
        """
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        try:
            if self.run is not None and trainer.training and batches.processed == batches.ready:
                self._end_interrupted_step(self.run, trainer.global_step)
            if self._siblings is not None:
                self._siblings.failed = True
                if self._siblings.ranks.all_here():
                    self._make_copies()
        except Exception as error:  # noqa: BLE001  # the error that ends the run is the one to be seen
            self._problems.meet(error)
        self.teardown(trainer, pl_module, "")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove every hook. Lightning calls it when a run has ended."""
        with ExitStack() as stack:  # each is done, whatever becomes of the others
            stack.callback(self._abort_step)
            stack.callback(self._validation_hooks.close)
            stack.callback(self._inference_mode_kept.close)
        self._in_fit = False
        self._training.clear()
        self.editor.recalibration = None  # it runs this module, and the editor may be used for others
        if self._siblings is not None:
            self._siblings.waits = False
