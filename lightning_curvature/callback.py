"""The Lightning callback: when to collect, when to edit, what to save and log."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from tabulate import tabulate

from lightning_curvature._checks import check_count
from lightning_curvature.checkpoints.lightning import Checkpoint, SiblingCheckpointIO
from lightning_curvature.collect import Collector, check_options
from lightning_curvature.editor import DEFAULT_ENERGY, CurvatureEditor, EditReport
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.probes import evaluating, run_probes

CHECKPOINT_KEY = "lightning_curvature"
_AVERAGING = {"WeightAveraging", "StochasticWeightAveraging"}  # by name: older releases do not have the first
MIN_WINDOW = 4096
"""Positions of the shortest default window; docs/decisions.md shows why."""


class KFACEditCallback(Callback):
    """Collects K-FAC factors during fit and leaves an edited sibling beside every checkpoint.

    The live weights never change, and neither do optimizer state and random state: a run with the callback is bit for
    bit the run without it. ``NAME.ckpt`` stays as it was; ``NAME-edited.ckpt`` holds the edited weights and loads with
    ``load_from_checkpoint``.

    If the module or the datamodule has a method ``probe_dataloader()`` that returns a dict of dataloaders, the callback
    measures the model on them before and after the edit, after each validation and at the end of fit, and logs the
    results as ``curvature/{probe}/{metric}/before`` and ``.../after``. Batches are ``(inputs, labels)`` or
    ``(inputs, noised, clean)``; the module's ``forward(inputs)`` gives the logits.

    Source: arXiv:2510.24256. The defaults follow from ``benchmarks/``; see ``docs/decisions.md``.

    Args:
        layers: What to edit: presets ``"last-mlp"``, ``"mlp"``, ``"attention"``, ``"linear"``, fnmatch patterns on
            module names, or a list of them.
        energy: Share of the curvature mass that the edit keeps, in (0, 1], or a dict of layer patterns to shares.
        fisher: ``"sketched"``, ``"sampled"``, ``"exact"`` or ``"empirical"``.
        draws: Backward passes per batch of ``"sketched"`` and ``"sampled"``.
        positions: Which positions count: ``"contributing"``, ``"all"``, ``"first"``, or ``"mask:KEY"`` for a mask in
            the batch.
        window: Positions of each layer that make a window. Weights move during fit, so the factors are those of the
            latest complete window; until there is one, those of all steps so far. None means eight times the layer's
            larger dimension, and at least 4096: a confident model has large gradients at few positions only, and a
            short window sees too few of them.
        logits: Submodule or method of the module that returns the logits, if its cross-entropy cannot be found.
        seed: Seed of the callback's own random generator.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is none of its options.
        MisconfigurationException: If the Trainer cannot be used with it.

    Example:
        >>> trainer = pl.Trainer(callbacks=[KFACEditCallback()], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        layers: str | list[str] = "last-mlp",
        energy: float | dict[str, float] = DEFAULT_ENERGY,
        fisher: str = "sketched",
        draws: int = 1,
        positions: str = "contributing",
        window: int | None = None,
        logits: str | None = None,
        seed: int = 0,
    ) -> None:
        self.editor = CurvatureEditor(energy)
        self.window = None if window is None else check_count(window, "window")
        self._options: dict[str, Any] = {
            "layers": layers,
            "fisher": fisher,
            "draws": draws,
            "positions": positions,
            "logits": logits,
            "seed": seed,
        }
        check_options(fisher, draws, positions)
        self.report: EditReport | None = None
        self.probe_results: dict[str, float] = {}
        self._collector: Collector | None = None
        self._window_factors = KroneckerFactors()

    @property
    def factors(self) -> KroneckerFactors:
        """The factors of the latest complete window, or of all steps so far; empty before the first batch."""
        if self._window_factors or self._collector is None:
            return self._window_factors
        return self._collector.factors()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this Trainer can be used, choose layers, and watch its checkpoints."""
        if not isinstance(trainer, pl.Trainer) or not isinstance(pl_module, pl.LightningModule):
            raise MisconfigurationException(
                "KFACEditCallback works with the `lightning` package; this Trainer or LightningModule comes from "
                "`pytorch_lightning`, whose classes are different ones. Use `import lightning as L; L.Trainer(...)` "
                "and `class Model(L.LightningModule)`."
            )
        if stage != "fit":
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if sum(isinstance(callback, KFACEditCallback) for callback in callbacks) > 1:
            raise MisconfigurationException(
                "The Trainer has several KFACEditCallbacks; they would write the same edited checkpoints. Give one, "
                "with a list of layers and a dict of energies if layers need different treatment."
            )
        averaging = [type(c).__name__ for c in callbacks if any(k.__name__ in _AVERAGING for k in type(c).__mro__)]
        if averaging:
            raise MisconfigurationException(
                f"KFACEditCallback collects the factors of the live weights, and {averaging[0]} saves averaged ones: "
                "the edit would not belong to them. Train without it, or collect over the averaged model afterwards "
                "(lightning_curvature.collect.collect)."
            )
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"KFACEditCallback collects in one process so far, this Trainer has {trainer.world_size}. Train "
                "distributed without it, then run one epoch with devices=1 and a learning rate of 0 to collect."
            )
        if isinstance(io := trainer.strategy.checkpoint_io, SiblingCheckpointIO):
            trainer.strategy.checkpoint_io = io.inner
        trainer.strategy.checkpoint_io = SiblingCheckpointIO(trainer.strategy.checkpoint_io, self._edited_checkpoint)
        self._collector = Collector(pl_module, **self._options)
        self._window_factors = KroneckerFactors()
        self.report = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start to record the step."""
        self._running().open(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Take the step's gradients while its graph is alive."""
        self._running().before_backward(loss)
        if pl_module.automatic_optimization:  # otherwise training_step is still running, with modes of its own
            self._running().stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the batch, and the window if it is full."""
        collector = self._running()
        collector.close()
        sums = collector.sums
        if sums and all(s.inputs.count >= (self.window or max(8 * max(s.shape), MIN_WINDOW)) for s in sums.values()):
            collector.provenance["step"] = trainer.global_step
            self._window_factors = collector.factors()
            collector.sums = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop a step that was cut short."""
        self._running().abort()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the probes before and after the edit, next to what the module logs."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.factors:
            pl_module.log_dict(self._run_probes(trainer, pl_module))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit a last time, for the table of what was edited, and measure the probes.

        Raises:
            RuntimeError: If not one batch could be collected.
        """
        factors = self.factors
        if not factors:
            raise RuntimeError(
                "KFACEditCallback collected no data: no training step ran a backward pass, or every batch held NaN or "
                "infinite values. There is no edited checkpoint."
            )
        for name, layer in factors.items():
            if layer.num_inputs < max(layer.shape):
                rank_zero_warn(
                    f"The factors of layer {name!r} rest on {layer.num_inputs} positions for a {list(layer.shape)} "
                    "weight: the spectrum looks steeper than it is, and the edit removes more than it should. Train "
                    "longer, or choose a smaller layer."
                )
        weights: dict[str, torch.Tensor] = {
            key: pl_module.get_parameter(key) for key in map("{}.weight".format, factors)
        }
        self.report = self.editor.edit_state_dict(weights, factors)[1]
        rank_zero_info(f"\n{self.report}")
        results = self._run_probes(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics(results, trainer.global_step)
        if results:
            rank_zero_info(f"\n{_before_after(results)}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove every hook."""
        if self._collector is not None:
            self._collector.abort()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove every hook."""
        if self._collector is not None:
            self._collector.abort()

    def _running(self) -> Collector:
        if self._collector is None:
            raise RuntimeError("KFACEditCallback.setup was not called; use the callback in a Trainer.")
        return self._collector

    def _edited_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint | None:
        factors = self.factors
        if not factors:
            return None
        state_dict, report = self.editor.edit_state_dict(checkpoint["state_dict"], factors)
        facts = {
            "method": report.method,
            "layers": {name: {"energy": edit.energy, "energy_kept": edit.energy_kept, "kept": edit.kept,
                              "num_inputs": edit.num_inputs} for name, edit in report.layers.items()},
            "factors": report.provenance,
        }  # fmt: skip
        return {**checkpoint, "state_dict": state_dict, CHECKPOINT_KEY: facts}

    def _run_probes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Return the probes' results under ``curvature/{probe}/{metric}/before|after``."""
        probes: dict[str, Any] = {}
        for source in (pl_module, getattr(trainer, "datamodule", None)):
            probes |= getattr(source, "probe_dataloader", dict)()
        if not probes:
            return {}

        def measure() -> Mapping[str, float]:
            with trainer.precision_plugin.val_step_context():
                return run_probes(pl_module, probes, trainer.strategy.batch_to_device)

        with isolate_rng(), evaluating(pl_module):
            before = measure()
            with self.editor.applied(pl_module, self.factors):
                after = measure()
        self.probe_results = {
            f"curvature/{name}/{when}": value
            for when, values in (("before", before), ("after", after))
            for name, value in values.items()
        }
        return self.probe_results


def _before_after(results: Mapping[str, float]) -> str:
    names = [name.removesuffix("/before") for name in results if name.endswith("/before")]
    rows = [[name.removeprefix("curvature/"), results[f"{name}/before"], results[f"{name}/after"]] for name in names]
    return tabulate(rows, ["probe", "before", "after"], floatfmt=".3f")
