"""The callback without its life cycle: its arguments and results, what it saves beside a checkpoint, and its copies."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from lightning_curvature._checks import check_count, check_option
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.recording.step import Step
from lightning_curvature.search.energy import Match
from lightning_curvature.trainer.edited_copy import LaterCopy
from lightning_curvature.trainer.outcome import Outcome
from lightning_curvature.trainer.probes import Probes
from lightning_curvature.trainer.problems import Problems
from lightning_curvature.trainer.run import CollectedRun
from lightning_curvature.trainer.siblings import CheckpointDict, CopyMaker, Siblings
from lightning_curvature.trainer.target import Target

LOOPS = ("train", "validation")


class CallbackBase(Callback):
    """Arguments and results of :class:`~lightning_curvature.KFACEditCallback`.

    Attributes:
        run: What the latest run collected; None before the first batch.
    """

    def __init__(
        self,
        layers: str | list[str] = "last-mlp",
        energy: float | dict[str, float] = DEFAULT_ENERGY,
        fisher: str = "sketched",
        draws: int = 1,
        positions: str = "contributing",
        window: int | None = None,
        every: int = 8,
        share: float = 1.0,
        loop: str = "train",
        logits: str | None = None,
        class_dim: int | None = None,
        probes: dict[str, Any] | None = None,
        accumulate_on: str = "auto",
        save_factors: str | None = None,
        name: str = "edited",
        seed: int = 0,
        score: str = "kfac",
        soft: bool = False,
        target: dict[str, float] | None = None,
        shard_factors: bool = False,
        skip_faulty: bool = False,
        min_positions: int | None = None,
    ) -> None:
        """Check the arguments.

        Args:
            layers: What to edit: presets ``"last-mlp"``, ``"mlp"``, ``"attention"``, ``"linear"``, fnmatch patterns on
                module names, or a list of them.
            energy: Share of the curvature mass that the edit keeps, in (0, 1], or a dict of layer patterns to shares.
            fisher: ``"sketched"``, ``"sampled"``, ``"exact"`` or ``"empirical"``.
            draws: Backward passes per batch of ``"sketched"`` and ``"sampled"``.
            positions: Which positions count: ``"contributing"``, ``"all"``, ``"first"``, or ``"mask:KEY"`` for a mask
                in the batch.
            window: Positions of each layer that make a window. Weights move during fit, so the factors are those of the
                latest complete window; until there is one, those of all steps so far. None means eight times the
                layer's larger dimension, and at least 4096: a confident model has large gradients at few positions
                only, and a short window sees too few of them.
            every: Collect one window of training steps in so many, and the last one of the run (if its length is known:
                by ``max_epochs`` or ``max_steps``). Until there is a window, each step is collected; so is each
                validation. More makes training cheaper, and the factors in the middle of a run older; see
                ``docs/performance.md``.
            share: Share of the positions of a collected batch that is used, in (0, 1], chosen at random.
            loop: Where to collect during fit: ``"train"``, or ``"validation"``.
            logits: Submodule or method of the module that returns the logits, if its cross-entropy cannot be found: a
                tensor ``[batch, classes]``, or one of more dimensions whose classes the softmax of the loss tells.
            class_dim: Dimension of the classes of these logits, where the loss does not tell: 1 for ``[batch, classes,
                ...]``, -1 for ``[batch, ..., classes]``.
            probes: By name, files of JSON lines to measure a language model on: a path, or a dict with ``path`` and
                optionally ``metrics`` (a list of names) and ``tokenizer`` (a folder; by default the attribute
                ``tokenizer`` of the module or the datamodule). See :class:`lightning_curvature.text.probes.JsonlProbe`.
            accumulate_on: Where the factors are summed: ``"model"``, on the device of each layer; ``"cpu"``; or
                ``"auto"``, on the device of each layer if they fit there, and otherwise on the CPU.
            save_factors: File to save the factors to, at the end of fit or of ``Trainer.validate``.
            name: Mark of the files beside a checkpoint, ``NAME-{name}.ckpt``. Several callbacks in one Trainer need
                different ones; results of probes are logged under ``curvature-{name}/`` unless it is ``"edited"``.
            seed: Seed of the callback's own random generator.
            score: What a direction is worth, see :mod:`~lightning_curvature.editing.scores`; all but ``"ekfac"``, which
                needs a pass over the data of its own.
            soft: Shrink directions of low score instead of dropping them.
            target: Instead of an energy, what the edit may cost: ``{"clean/perplexity": 1.1}`` is the strongest edit
                that raises the perplexity of the probe ``clean`` to at most 1.1 times what it was, ``{"val/accuracy":
                0.99}`` one that keeps 0.99 of an accuracy. The energy is searched for at the end of each validation
                (each epoch where there is none) and of fit, on that probe; look at another one for what the edit costs.
                Checkpoints that are saved later get the edit of the latest search, and those before the first one have
                no edited sibling.
            shard_factors: With several processes, spread the sums of the factors over them: each keeps those of some
                layers, and receives what the others add in every step. Less memory, more traffic.
            skip_faulty: Leave layers that cannot be edited (NaN, factors of zero) as they are, with a warning, and edit
                the others, instead of leaving no edited checkpoint.
            min_positions: Positions that the factors of a layer must rest on, or it is left as it is; None: as many as
                its live inputs and outputs, 0: edit it whatever they rest on.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument is none of its options.
        """
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name must be a part of a file name (letters, digits, '_', '-', '.'), found {name!r}.")
        if score == "ekfac":
            raise ValueError("score='ekfac' needs a second pass over the data: collect, correct_eigenvalues, edit.")
        self.name = name
        self.editor = CurvatureEditor(
            energy, score=score, soft=soft, skip_faulty=skip_faulty, min_positions=min_positions
        )
        self.options = CollectorOptions(
            layers, fisher, draws, positions, logits, class_dim, accumulate_on, share, score == "coupled", seed
        )
        self.shard_factors = shard_factors
        self.target = None if target is None else Target(target)
        self.window = None if window is None else check_count(window, "window")
        self.every = check_count(every, "every")
        self.loop = check_option(loop, LOOPS, "loop")
        self.probes = Probes(probes or {})
        self.save_factors = save_factors
        self._start_anew(KroneckerFactors())

    def _start_anew(self, factors: KroneckerFactors) -> None:
        """Reset to the state before any run; the factors given are kept."""
        prefix = "curvature" if self.name == "edited" else f"curvature-{self.name}"
        self._outcome = Outcome(self.editor, self.target, self.probes, prefix)
        self._problems = Problems()
        self._factors = factors
        self.run: CollectedRun | None = None
        self._step: Step | None = None
        self._prepared: CollectedRun | None = None
        self._awaits_batch = self._collects_in_validation = self._in_fit = self._saves_averages = False
        self._siblings: Siblings | None = None
        self._module: pl.LightningModule | None = None
        self._validation_hooks, self._inference_mode_kept = ExitStack(), ExitStack()

    @property
    def factors(self) -> KroneckerFactors:
        """The factors of the latest complete window, or of all steps so far; empty before the first batch.

        With several processes, as of the latest checkpoint, or end of a validation or of fit: they are added up there.
        """
        return self._factors if self.run is None else self.run.windows.factors

    @property
    def report(self) -> EditReport | None:
        """What an edit of the weights at the end of the latest run does; None before."""
        return self._outcome.report

    @property
    def match(self) -> Match | None:
        """The energy that was found for ``target``, and what it costs; None before."""
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

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; it differs where any setting does."""
        energy = self.editor.energy if self.target is None else self.target.entry
        return self._generate_state_key(name=self.name, energy=energy, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a run that goes on with the factors of another one must have in common with it."""
        return {**self.options.settings, "loop": self.loop, "window": self.window}

    def _abort_step(self) -> None:
        """Drop the step that is being recorded, and its hooks."""
        if self._step is not None:
            self._step.abort()

    def _end_interrupted_step(self, run: CollectedRun, global_step: int) -> None:
        """Add the step in which the run failed; where sums are spread it is dropped, since others may be gone."""
        if self._step is not None and self._step.holds_gradients and not run.collector.is_sharded:
            self._step.close()
            run.windows.end_step(global_step)

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
        if count and factors:
            self._outcome.tell_time(count, self._running().collector.kinds, factors)
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
        factors = KroneckerFactors() if run is None else self.factors
        if self._has_stopped() or not (factors or self._collects_in_validation):
            return None  # which was told when it happened, or there is nothing yet
        reason: str | None = "it was saved before the first validation"
        if self._outcome.is_undecided and factors:
            reason = (
                f"it was saved before the energy for {self.target} was searched, which is done when validation ends"
            )
        elif run is not None and factors:
            reason = run.why_no_copy(checkpoint, factors, self._saves_averages, self.editor.ranks)
        if reason is not None:
            self._problems.tell_no_copy(checkpoint["global_step"], reason)
            return None
        return LaterCopy(self.editor.at(self.editor.energy), factors, self._outcome.copies)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the callback holds: its settings and its results, nothing of a run that goes on."""
        copy = object.__new__(type(self))
        vars(copy).update(vars(self))
        editor = self.editor
        copy.editor = CurvatureEditor(
            editor.energy,
            score=editor.score,
            soft=editor.soft,
            skip_faulty=editor.skip_faulty,
            min_positions=editor.min_positions,
        )
        copy.probes = Probes(self.probes.files)
        copy._start_anew(self.factors if self.editor.ranks.size == 1 else KroneckerFactors())
        copy._outcome.take_over(self._outcome)
        for name in ("log", "log_dict"):  # methods of the module, which Lightning puts here
            vars(copy).pop(name, None)
        return vars(copy)
