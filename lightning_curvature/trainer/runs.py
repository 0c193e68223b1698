"""How a run of the callback begins, and how it goes on where another one was saved."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_curvature.checkpoints.facts import checkpoint_note
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.editing.reference import Reference
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import has_lazy
from lightning_curvature.layers.selection import PresetError
from lightning_curvature.trainer.base import CallbackBase
from lightning_curvature.trainer.problems import never_ends_a_fit
from lightning_curvature.trainer.run import CollectedRun


class CallbackRuns(CallbackBase):
    """The runs of :class:`~lightning_curvature.KFACEditCallback`."""

    def _prepare(self, pl_module: pl.LightningModule) -> CollectedRun | None:
        """Return the run to collect, whose layers are chosen when the module has been built (``configure_model``).

        Lazy layers have no shape yet: the run begins with the first batch that finds them built.
        """
        if self._awaits_batch and self._prepared is None and not self._problems.given_up and not has_lazy(pl_module):
            on_error = self._problems.meet if self._in_fit else None
            ranks, shard = self.editor.ranks, self.shard_factors
            collector = Collector(pl_module, self.options, ranks=ranks, shard=shard, on_error=on_error)
            windows = WindowedFactors(collector, self.window, self._settings, self.every)
            self._prepared = CollectedRun(collector, windows)
        return self._prepared if self._awaits_batch else self.run

    def _begin(self, pl_module: pl.LightningModule) -> CollectedRun | None:
        """Let this run take the place of the one before; None if layers are lazy still."""
        run = self._prepare(pl_module)
        if self._awaits_batch and run is not None:
            self.run, self._prepared, self._awaits_batch, self._factors = run, None, False, KroneckerFactors()
            self._outcome.clear()
        return run

    @never_ends_a_fit
    def _keep_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the weights that the run begins with, on the CPU; those of a run that goes on are in its checkpoint."""
        if not self.keeps_start:
            return
        if self._start is None:
            if trainer.ckpt_path is not None:
                rank_zero_warn(
                    f"{trainer.ckpt_path} does not hold the start of its run; the update since this run is edited. "
                    "Name the checkpoint that the model was fine-tuned from, reference=PATH, if you mean that."
                )
            weights = dict(module.named_parameters())
            if any(hasattr(weight, "full_tensor") for weight in weights.values()):
                raise ValueError(
                    "reference='start' keeps no sharded weights. Name the checkpoint that they come from: a path."
                )
            self._start = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        self.editor.reference = Reference(self._start)

    def state_dict(self) -> dict[str, Any]:
        """Return what tells a resumed run that the factor file beside the checkpoint belongs to it, and the start."""
        run = self._run_of_module()
        state = {**({} if run is None else run.windows.state_dict()), **self._outcome.state()}
        start = {} if self._start is None else {"start": self._start}
        return {"name": self.name, **state, **start} if state or start else {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on collecting where the run that saved the checkpoint was. Lightning calls it before a fit goes on."""
        if trainer.state.fn == "fit" and (note := checkpoint_note(checkpoint)) is not None:
            rank_zero_warn(f"Training goes on from {trainer.ckpt_path}. {note}")
        state = self._saved_state(checkpoint)
        if trainer.state.fn == "fit" and state and self.keeps_start:
            self._start = state.pop("start", None)
        if trainer.state.fn != "fit" or not state or self._siblings is None:
            return
        try:
            run = self._prepare(pl_module)
            reason: str | None = "its layers are lazy, and have no shape yet"
            if run is not None:
                with self._siblings.loaded_factors(self.name) as file:
                    reason = run.windows.resume(state, file)
        except PresetError as error:
            reason = str(error).rstrip(".")
        except (KeyError, TypeError) as error:
            reason = f"its state is not one of this version ({type(error).__name__}: {error})"
        if reason is not None:
            rank_zero_warn(
                f"KFACEditCallback does not go on where {trainer.ckpt_path} was saved, it starts anew: {reason}."
            )
            return
        self._begin(pl_module)
        self._outcome.resume(state)
