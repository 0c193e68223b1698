"""How a run of the callback begins, and how it goes on where another one was saved."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy as is_lazy_tensor
from typing_extensions import override

from lightning_curvature.checkpoints.facts import checkpoint_note
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.editing.adapters import has_adapters
from lightning_curvature.editing.reference import Reference
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import has_lazy
from lightning_curvature.layers.selection import PresetError
from lightning_curvature.layers.trained import has_trained_weights
from lightning_curvature.memory import free_memory, size
from lightning_curvature.trainer.base import CallbackBase
from lightning_curvature.trainer.given_factors import given_factors
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
            self.run, self._prepared, self._awaits_batch = run, None, False
            self._factors = self._validated = KroneckerFactors()
            self._outcome.clear()
        return run

    @never_ends_a_fit
    def _settle(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Decide what is edited, updates or weights, when the module has been built. A collective."""
        if self._is_settled:
            return
        self._is_settled = True
        updates = has_adapters(module)
        if self._finds_reference and self._in_fit and not updates:
            self.keeps_start = self._start is not None or self._begins_trained(trainer, module)
        self._use_defaults(updates or self.keeps_start or self._reference is not None, module)

    def _begins_trained(self, trainer: pl.Trainer, module: pl.LightningModule) -> bool:
        """Tell whether a run begins with trained weights, of which a copy can be kept. A collective."""
        weights, ranks = list(module.parameters()), self.editor.ranks
        sharded = any(hasattr(weight, "full_tensor") for weight in weights)
        if sharded or has_lazy(module) or _goes_on(trainer):
            return False
        if not all(ranks.gather(ranks.together(lambda: has_trained_weights(module)))):
            return False
        num_bytes = sum(weight.nbytes for weight in weights)
        # Each process of this machine keeps a copy.
        fits = all(ranks.gather(2 * num_bytes * trainer.num_devices <= free_memory(torch.device("cpu"))))
        what = "This fit begins with trained weights"
        if fits:
            rank_zero_info(
                f"{what}: KFACEditCallback edits what it changes, and keeps the start on the CPU and in checkpoints, "
                f"{size(num_bytes)}. reference=PATH keeps nothing; reference=None edits the weights."
            )
        else:
            rank_zero_warn(
                f"{what}, and there is no room to keep a copy of them ({size(num_bytes)}): KFACEditCallback edits the "
                "weights. To edit what the fit changes, name the checkpoint that it begins with: reference=PATH."
            )
        return fits

    @never_ends_a_fit
    def _keep_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the weights that the run begins with, on the CPU; those of a run that goes on are in its checkpoint."""
        if not self.keeps_start:
            return
        if self._start is None:
            if _goes_on(trainer):
                rank_zero_warn(
                    f"{trainer.ckpt_path} does not hold the start of its run; the update since this run is edited. "
                    "Name the checkpoint that the model was fine-tuned from, reference=PATH, if you mean that."
                )
            weights = dict(module.named_parameters(remove_duplicate=False))
            if any(hasattr(weight, "full_tensor") for weight in weights.values()):
                raise ValueError(
                    "reference='start' keeps no sharded weights. Name the checkpoint that they come from: a path."
                )
            kept: dict[int, Tensor] = {}  # a tied weight is kept once, under each of its names
            for weight in weights.values():
                if id(weight) not in kept and not is_lazy_tensor(weight):
                    kept[id(weight)] = weight.detach().to("cpu", copy=True)
            self._start = {name: kept[id(weight)] for name, weight in weights.items() if id(weight) in kept}
        self.editor.reference = Reference(self._start)

    @override
    def _take_factors(self, module: pl.LightningModule, at_start: bool = True) -> None:
        if self.factors_file is not None:
            self._factors = given_factors(self.factors_file, module, self.editor, at_start)

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
        if trainer.state.fn != "fit":
            return
        if state and (self.keeps_start or self._finds_reference):
            self._start = state.pop("start", None)
        self._settle(trainer, pl_module)
        if not state or self._siblings is None:
            return
        if self.factors_file is not None or "settings" not in state:
            self._outcome.resume(state)
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


def _goes_on(trainer: pl.Trainer) -> bool:
    """Tell whether a fit goes on from a checkpoint, and not from one that a tuner of Lightning restores."""
    path = trainer.ckpt_path
    return path is not None and not Path(path).name.startswith((".lr_find_", ".scale_batch_size_"))
