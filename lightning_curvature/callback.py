"""The Lightning callback: when to collect, when to edit, what to save and log."""

import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_curvature._checks import check_count, check_option, listing
from lightning_curvature.checkpoints.lightning import Checkpoint, Siblings
from lightning_curvature.collect import check_silent
from lightning_curvature.collection import Collection
from lightning_curvature.collector import Collector, check_options
from lightning_curvature.editing import DEFAULT_ENERGY
from lightning_curvature.editor import CurvatureEditor
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.probes import Probes, Target, before_after
from lightning_curvature.report import EditReport
from lightning_curvature.siblings import edited_copy, weight_hashes
from lightning_curvature.targets import Match
from lightning_curvature.trainers import batches_before, check_callbacks, check_strategy, check_validation, last_batch
from lightning_curvature.validation import collected_from
from lightning_curvature.weights import layer_weights

_NO_DATA = (
    "KFACEditCallback collected no data: no {}, or every batch held NaN or infinite values. "
    "There is no edited checkpoint."
)
LOOPS = ("train", "validation")


class KFACEditCallback(Callback):
    """Collects K-FAC factors in fit or validation, and leaves an edited sibling beside every checkpoint.

    The live weights never change, and neither do optimizer state and random state: a run with the callback is bit for
    bit the run without it (but for ``torch.compile``, without which collected steps run). ``NAME.ckpt`` stays as it
    was; ``NAME-edited.ckpt`` holds the edited weights and loads with ``load_from_checkpoint``.

    ``Trainer.validate`` collects too, unless the callback holds factors of a fit with ``loop="train"``, and so does the
    validation inside fit with ``loop="validation"``; the sanity check does not count. Weights do not move there: the
    factors are exact for the checkpoints that are saved before training goes on. The validation step runs once, as
    usual, with gradients enabled.

    Probes are data on which the model is measured before and after the edit, at the end of each validation and of fit;
    results are logged as ``curvature/{probe}/{metric}/before`` and ``.../after``. There are two ways to give them: the
    argument ``probes``, for files, and a method ``probe_dataloader()`` of the module or the datamodule that returns a
    dict of dataloaders. Their batches are ``(inputs, labels)`` or ``(inputs, noised, clean)``, for which the module's
    ``forward(inputs)`` gives the logits; or dicts with ``input_ids``, which a transformers causal LM inside the module
    reads, for perplexity.

    Beside every checkpoint there is also a factor file, ``NAME-edited-factors.safetensors``, from which
    ``fit(ckpt_path=...)`` goes on collecting, and which ``lightning-curvature edit`` takes.

    With several processes (``docs/support.md`` lists strategies and precisions) the factors are those of all data: they
    are added up when they are used, which is at each checkpoint, at the end of a validation and of fit.

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
        every: Collect one window of training steps in so many, and the last one of the run (if its length is known: by
            ``max_epochs`` or ``max_steps``). Until there is a window, each step is collected; so is each validation.
            More makes training cheaper, and the factors in the middle of a run older; see ``docs/performance.md``.
        share: Share of the positions of a collected batch that is used, in (0, 1], chosen at random.
        loop: Where to collect during fit: ``"train"``, or ``"validation"``.
        logits: Submodule or method of the module that returns the logits, if its cross-entropy cannot be found.
        probes: By name, files of JSON lines to measure a language model on: a path, or a dict with ``path`` and
            optionally ``metrics`` (a list of names) and ``tokenizer`` (a folder; by default the attribute ``tokenizer``
            of the module or the datamodule). See :class:`lightning_curvature.text.probes.JsonlProbe`.
        accumulate_on: Where the factors are summed: ``"model"``, on the device of each layer; ``"cpu"``; or ``"auto"``,
            on the device of each layer if they fit there, and otherwise on the CPU.
        save_factors: File to save the factors to, at the end of fit or of ``Trainer.validate``.
        name: Mark of the files beside a checkpoint, ``NAME-{name}.ckpt``. Several callbacks in one Trainer need
            different ones; results of probes are logged under ``curvature-{name}/`` unless it is ``"edited"``.
        seed: Seed of the callback's own random generator.
        score: What a direction is worth, see :mod:`lightning_curvature.scores`; all but ``"ekfac"``, which needs a pass
            over the data of its own.
        soft: Shrink directions of low score instead of dropping them.
        target: Instead of an energy, what the edit may cost: ``{"clean/perplexity": 1.1}`` is the strongest edit that
            raises the perplexity of the probe ``clean`` to at most 1.1 times what it was, ``{"val/accuracy": 0.99}``
            one that keeps 0.99 of an accuracy. The energy is searched for at the end of each validation (each epoch
            where there is none) and of fit, on that probe; look at another one for what the edit costs. Checkpoints
            that are saved later get the edit of the latest search, and those before the first one have no edited
            sibling.
        shard_factors: With several processes, spread the sums of the factors over them: each keeps those of some
            layers, and receives what the others add in every step. Less memory, more traffic.
        skip_faulty: Leave layers that cannot be edited (NaN, factors of zero) as they are, with a warning, and edit the
            others, instead of leaving no edited checkpoint.

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
        every: int = 8,
        share: float = 1.0,
        loop: str = "train",
        logits: str | None = None,
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
    ) -> None:
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name must be a part of a file name (letters, digits, '_', '-', '.'), found {name!r}.")
        self.name = name
        self.editor = CurvatureEditor(energy, score=score, soft=soft, skip_faulty=skip_faulty)
        self.shard_factors = shard_factors
        if score == "ekfac":
            raise ValueError("score='ekfac' needs a second pass over the data: collect, correct_eigenvalues, edit.")
        self.target = None if target is None else Target(target)
        self.window = None if window is None else check_count(window, "window")
        self.every = check_count(every, "every")
        self.loop = check_option(loop, LOOPS, "loop")
        self.probes = Probes(probes or {})
        self.save_factors = save_factors
        self._options: dict[str, Any] = {
            "layers": layers,
            "fisher": fisher,
            "draws": draws,
            "positions": positions,
            "logits": logits,
            "accumulate_on": accumulate_on,
            "share": share,
            "seed": seed,
            **({"coupled": True} if score == "coupled" else {}),
        }
        check_options(fisher, draws, positions, accumulate_on, share)
        self.report: EditReport | None = None
        self.match: Match | None = None
        self.probe_results: dict[str, float] = {}
        self._collection: Collection | None = None
        self._validates = False
        self._fitted = False
        self._siblings: Siblings | None = None
        self._validated: dict[str, str] = {}
        self._averages = False
        self._watch, self._stack = ExitStack(), ExitStack()

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; it differs where any setting does."""
        energy = self.editor.energy if self.target is None else self.target.entry
        return self._generate_state_key(name=self.name, energy=energy, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a run that goes on with the factors of another one must have in common with it."""
        kept = {key: value for key, value in self._options.items() if key not in ("accumulate_on", "seed", "share")}
        return {**kept, "loop": self.loop, "window": self.window}

    @property
    def factors(self) -> KroneckerFactors:
        """The factors of the latest complete window, or of all steps so far; empty before the first batch.

        With several processes, as of the latest checkpoint, or end of a validation or of fit: they are added up there.
        """
        return KroneckerFactors() if self._collection is None else self._collection.factors

    @property
    def _undecided(self) -> bool:
        """Whether there is a target whose energy was not found yet."""
        return self.target is not None and self.match is None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this Trainer can be used, choose layers, and watch its checkpoints."""
        if not isinstance(trainer, pl.Trainer) or not isinstance(pl_module, pl.LightningModule):
            raise MisconfigurationException(
                "KFACEditCallback works with the `lightning` package; this Trainer or LightningModule comes from "
                "`pytorch_lightning`, whose classes are different ones. Use `import lightning as L; L.Trainer(...)` "
                "and `class Model(L.LightningModule)`."
            )
        if stage not in ("fit", "validate"):
            return
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, KFACEditCallback) and c is not self]
        if self.name in (callback.name for callback in others):
            raise MisconfigurationException(
                f"Several KFACEditCallbacks have the name {self.name!r}; they would write the same edited checkpoints. "
                "Give each a name=, which becomes NAME-{name}.ckpt."
            )
        strategy = trainer.strategy
        check_strategy(strategy)
        if stage == "fit":
            self._averages = check_callbacks(self, callbacks, collects_in_validation=self.loop == "validation")
        self._siblings = Siblings.of(strategy)
        self._siblings.owners[self.name], self._siblings.failed = self, False
        self.editor.ranks = self._siblings.ranks
        self.probes.check()
        if self.target is not None:
            datamodule = getattr(trainer, "datamodule", None)
            self.target.check(self.probes.files, any(hasattr(s, "probe_dataloader") for s in (pl_module, datamodule)))
        self._validates = self.loop == "validation" or (stage == "validate" and not self._fitted)
        if self._validates:
            check_validation(self.editor.ranks, pl_module, getattr(trainer, "datamodule", None))
        if stage == "validate" and not self._validates:
            return  # the factors of the fit stay
        self._fitted, self._collection = False, None
        self.report = self.match = None
        if self._validates:
            # Inference tensors can never enter a graph, and the mode is entered before any hook of a callback runs.
            loop: Any = trainer.validate_loop if stage == "validate" else trainer.fit_loop.epoch_loop.val_loop
            self._stack.callback(setattr, loop, "inference_mode", loop.inference_mode)
            loop.inference_mode = False

    def _prepare(self, pl_module: pl.LightningModule) -> Collection:
        """Choose the layers, when the module has been built (``configure_model``) and before anything runs."""
        if self._collection is None:
            collector = Collector(pl_module, **self._options, ranks=self.editor.ranks, shard=self.shard_factors)
            self._collection = Collection(collector, self.window, self._settings, self.every)
        return self._collection

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose layers."""
        self._prepare(pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the validation step, if this is where to collect."""
        if trainer.sanity_checking or not self._validates:
            return
        self._prepare(pl_module).start(complete=False)
        self._watch.enter_context(collected_from(pl_module, self._running().collector))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start to record the step."""
        if self.loop == "train" and self._running().is_due(batches_before(trainer), last_batch(trainer)):
            self._running().collector.open(batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Take the step's gradients while its graph is alive."""
        collector = self._running().collector
        collector.before_backward(loss)
        if pl_module.automatic_optimization:  # otherwise training_step is still running, with modes of its own
            collector.stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the batch, and the window if it is full."""
        if self._running().collector.is_open:
            self._running().end_step(trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop a step that was cut short; without a validation, this is where a target's energy is searched."""
        self._running().collector.abort()
        if self.target is not None and not trainer.enable_validation and self._running().synchronise():
            self._search(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the factors of this validation; measure the probes before and after the edit, next to what is logged.

        Raises:
            RuntimeError: If not one validation batch could be collected.
        """
        if trainer.sanity_checking:
            return
        if self._validates:
            self._watch.close()
            collection = self._running()
            collection.collector.accumulator.join()
            collection.collector.provenance |= {"loop": "validation", "step": trainer.global_step}
            silent = collection.silent
            collection.start(complete=True)
            if not collection.synchronise():
                raise RuntimeError(_NO_DATA.format("validation step computed a loss"))
            self._check_silent(silent)
            self._validated = weight_hashes(layer_weights(pl_module, self.factors))
        # After a fit the factors are known; its other processes need not be here.
        if self.factors if self._fitted else self._running().synchronise():
            self._search(trainer, pl_module)
            results = self._run_probes(trainer, pl_module)
            if results:
                pl_module.log_dict(results)
        if self._validates:
            self._edit_copy(pl_module)
            if trainer.state.fn == "validate":
                self._show()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit a last time, for the table of what was edited, and measure the probes.

        Raises:
            RuntimeError: If not one batch could be collected.
        """
        collection = self._running()
        collection.collector.accumulator.join()
        if not collection.synchronise():
            source = "training step ran a backward pass" if self.loop == "train" else "validation ran"
            raise RuntimeError(_NO_DATA.format(source))
        self._fitted = True
        if self.loop == "train":
            self._check_silent(collection.silent)
            self._search(trainer, pl_module)
            self._edit_copy(pl_module)
            results = self._run_probes(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(results, trainer.global_step)
        self._show()

    def _check_silent(self, silent: list[str]) -> None:
        if silent and self.editor.skip_faulty:
            rank_zero_warn(f"Chosen layers {listing(silent)} never ran, and stay as they are.")
        else:
            check_silent(silent)

    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the energy of the target, if there is one."""
        if self.target is None:
            return
        self.match = self.probes.match(trainer, pl_module, self.editor.at(1.0), self.factors, self.target)
        if self.match is None:
            return
        self.editor.energy = self.match.energy
        rank_zero_info(f"{self.target}: energy {self.match.energy:.4g}, {self.match.value:.4f} times")

    def _edit_copy(self, pl_module: pl.LightningModule) -> None:
        """Edit a copy of the weights, for the table of what an edit does."""
        if self._undecided:
            return
        factors = self.factors
        self.report = self.editor.edit_layers(layer_weights(pl_module, factors), factors)[1]

    def _show(self) -> None:
        """Show what an edit does and what the probes say, warn of factors that rest on little, and save them."""
        factors, kinds = self.factors, self._running().collector.kinds
        for name, count in factors.counts().items():
            if count < max(kinds[name].d_in, kinds[name].d_out):
                rank_zero_warn(
                    f"The factors of layer {name!r} rest on {count} positions for a "
                    f"{[kinds[name].d_out, kinds[name].d_in]} weight: the spectrum looks steeper than it is, and the "
                    "edit removes more than it should. Train longer, or choose a smaller layer."
                )
        if self.report is not None:
            rank_zero_info(f"\n{self.report}")
        if self.probe_results:
            rank_zero_info(f"\n{before_after(self.probe_results)}")
        if (path := self.save_factors) is not None:
            gathered = factors.gathered()
            self.editor.ranks.first(lambda: gathered.save(path))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish a batch that has ended for Lightning, which does not run it again, and remove every hook."""
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if self._collection is not None and trainer.training and batches.processed == batches.ready:
            self._collection.end_interrupted(trainer.global_step)
        if self._siblings is not None:
            self._siblings.failed = True
        self._clean_up()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove every hook."""
        self._clean_up()

    def _clean_up(self) -> None:
        if self._collection is not None:
            self._collection.collector.abort()
        self._watch.close()
        self._stack.close()

    def _running(self) -> Collection:
        if self._collection is None:
            raise RuntimeError("KFACEditCallback.setup was not called; use the callback in a Trainer.")
        return self._collection

    def state_dict(self) -> dict[str, Any]:
        """Return what tells a resumed run that the factor file beside the checkpoint belongs to it; primitives."""
        state = {} if self._collection is None else self._collection.state_dict()
        if self.target is not None and self.match is not None:
            state["match"] = {"target": self.target.entry, "energy": self.match.energy, "value": self.match.value}
        return {"name": self.name, **state} if state else {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on collecting where the run that saved the checkpoint was."""
        # By name: the state key changes with every setting, also with those that the factors do not depend on.
        kind = type(self).__qualname__
        states = [s for key, s in checkpoint.get("callbacks", {}).items() if str(key).startswith(kind)]
        state = next((state for state in states if state.get("name") == self.name), None)
        if trainer.state.fn != "fit" or not state or self._siblings is None:
            return
        with self._siblings.loaded_factors(self.name) as file:
            reason = self._prepare(pl_module).resume(state, file)
        found = state.get("match")
        if reason is None and found and self.target is not None and found["target"] == self.target.entry:
            self.match = Match(found["energy"], found["value"], {found["energy"]: found["value"]})
            self.editor.energy = self.match.energy
        if reason is not None:
            rank_zero_warn(
                f"KFACEditCallback does not go on where {trainer.ckpt_path} was saved, it starts anew: {reason}."
            )

    def factors_writer(self) -> Callable[[Path], None] | None:
        """Return what writes the factors to a file beside a checkpoint; None if there are none yet."""
        collection, ranks = self._collection, self.editor.ranks
        # Those of a run that other processes took part in cannot be had any more.
        found = None if collection is None or collection.ranks is not ranks else collection.snapshot()
        return None if found is None else lambda path: found[0].save(path, found[1])

    def edited(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Return the edited copy of a checkpoint; None, with a warning, if there is none that is right."""
        factors, step = self.factors, checkpoint["global_step"]
        if not factors:
            if self._validates:
                rank_zero_warn(
                    f"A checkpoint of step {step} was saved before the first validation: it has no edited copy."
                )
            return None
        if self._undecided:
            rank_zero_warn(
                f"A checkpoint of step {step} was saved before the energy for {self.target} was "
                "searched, which is done when validation ends: it has no edited copy."
            )
            return None
        validated = self._validated if self._validates else None
        return edited_copy(checkpoint, self.editor, factors, validated, self._averages)

    def _run_probes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Return the probes' results under ``curvature/{probe}/{metric}/before|after``."""
        results = {} if self._undecided else self.probes.measure(trainer, pl_module, self.editor, self.factors)
        group = "curvature" if self.name == "edited" else f"curvature-{self.name}"
        self.probe_results = {f"{group}/{name}": value for name, value in results.items()}
        return self.probe_results
