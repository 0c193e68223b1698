"""The Lightning callback: when to collect, when to edit, what to save and log."""

import functools
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_curvature._checks import check_count, check_option, listing
from lightning_curvature.checkpoints.facts import checkpoint_note
from lightning_curvature.collect.collector import Collector, check_class_dim, check_options
from lightning_curvature.collect.passes import check_silent
from lightning_curvature.collect.validation_step import collected_from
from lightning_curvature.collect.windows import WindowedFactors
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.basis import FaultyLayerError
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import has_lazy
from lightning_curvature.layers.modules import layer_weights
from lightning_curvature.layers.selection import PresetError
from lightning_curvature.memory import edit_seconds
from lightning_curvature.recording.objectives import NothingToCollectError
from lightning_curvature.search.energy import Match
from lightning_curvature.trainer.edited_copy import LaterEdit, Measured, WeightWatch, weight_hashes, why_no_copy
from lightning_curvature.trainer.probes import Probes, Target, before_after
from lightning_curvature.trainer.siblings import CheckpointDict, Edit, Siblings
from lightning_curvature.trainer.support import (
    RunLength,
    batches_before,
    check_callbacks,
    check_strategy,
    check_validation,
)

_NO_DATA = (
    "KFACEditCallback collected no data: no {}, or every batch held NaN or infinite values. "
    "There is no edited checkpoint."
)
_TENTH = 0.1  # share of the training's time above which the time of edits is told
LOOPS = ("train", "validation")


def _never_ends_a_fit(hook: Callable[..., None]) -> Callable[..., None]:
    """Make a warning of an error that a hook meets while a fit runs: the callback is an extra."""

    @functools.wraps(hook)
    def guarded(self: "KFACEditCallback", *args: Any, **kwargs: Any) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            if not self._in_fit:
                raise
            self._met(error)

    return guarded


def _is_gone(path: str) -> bool:
    """Tell whether a local file was removed since."""
    return isinstance(get_filesystem(path), LocalFileSystem) and not Path(path).exists()


class KFACEditCallback(Callback):
    """Collects K-FAC factors in fit or validation, and leaves an edited sibling beside every checkpoint.

    The live weights never change, and neither do optimizer state and random state: a run with the callback is bit for
    bit the run without it (but for ``torch.compile``, without which collected steps run). ``NAME.ckpt`` stays as it
    was; ``NAME-edited.ckpt`` holds the edited weights and loads with ``load_from_checkpoint``. Edited copies are made
    when fit ends, of the checkpoints that are still there.

    The callback never ends a fit that runs without it: what cannot be collected or edited costs the edited copy, and a
    warning says why. Only an argument that does not fit is an error, before the first step.

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
        logits: Submodule or method of the module that returns the logits, if its cross-entropy cannot be found: a
            tensor ``[batch, classes]``, or one of more dimensions whose classes the softmax of the loss tells.
        class_dim: Dimension of the classes of these logits, where the loss does not tell: 1 for
            ``[batch, classes, ...]``, -1 for ``[batch, ..., classes]``.
        probes: By name, files of JSON lines to measure a language model on: a path, or a dict with ``path`` and
            optionally ``metrics`` (a list of names) and ``tokenizer`` (a folder; by default the attribute ``tokenizer``
            of the module or the datamodule). See :class:`lightning_curvature.text.probes.JsonlProbe`.
        accumulate_on: Where the factors are summed: ``"model"``, on the device of each layer; ``"cpu"``; or ``"auto"``,
            on the device of each layer if they fit there, and otherwise on the CPU.
        save_factors: File to save the factors to, at the end of fit or of ``Trainer.validate``.
        name: Mark of the files beside a checkpoint, ``NAME-{name}.ckpt``. Several callbacks in one Trainer need
            different ones; results of probes are logged under ``curvature-{name}/`` unless it is ``"edited"``.
        seed: Seed of the callback's own random generator.
        score: What a direction is worth, see :mod:`~lightning_curvature.editing.scores`; all but ``"ekfac"``, which
            needs a pass over the data of its own.
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
        min_positions: Positions that the factors of a layer must rest on, or it is left as it is; None: as many as its
            live inputs and outputs, 0: edit it whatever they rest on.

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
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name must be a part of a file name (letters, digits, '_', '-', '.'), found {name!r}.")
        self.name = name
        self.editor = CurvatureEditor(
            energy, score=score, soft=soft, skip_faulty=skip_faulty, min_positions=min_positions
        )
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
            "class_dim": class_dim,
            "accumulate_on": accumulate_on,
            "share": share,
            "seed": seed,
            **({"coupled": True} if score == "coupled" else {}),
        }
        check_options(fisher, draws, positions, accumulate_on, share)
        check_class_dim(class_dim, logits)
        self._kept = KroneckerFactors()
        self._reset()

    def _reset(self) -> None:
        """Set everything that belongs to a run to what it is before any."""
        self.report: EditReport | None = None
        self.match: Match | None = None
        self.probe_results: dict[str, float] = {}
        self._collection: WindowedFactors | None = None
        self._next: WindowedFactors | None = None
        self._renew = self._validates = self._fitted = self._in_fit = self._due = False
        self._averages = self._validated_swapped = False
        self._siblings: Siblings | None = None
        self._module: pl.LightningModule | None = None
        self._validated: dict[str, str] | None = None
        self._weights: WeightWatch | None = None
        self._told = set[str]()
        self._length, self._started = RunLength(), 0.0
        self._copies: dict[str, EditReport] = {}
        self._given_up: str | None = None
        self._said: dict[str, None] = {}
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
        return self._kept if self._collection is None else self._collection.factors

    @property
    def problem(self) -> str | None:
        """Why the callback stopped, or collected nothing from a step, in the latest run; None if all went well."""
        return self._given_up or next(iter(self._said), None)

    @property
    def _undecided(self) -> bool:
        """Whether there is a target whose energy was not found yet."""
        return self.target is not None and self.match is None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that this Trainer can be used, and watch its checkpoints. Lightning calls it before each run.

        The factors of a run before stay until this one collects its first batch.
        """
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
        self._module = pl_module
        self._siblings = Siblings.of(strategy)
        self._siblings.savers[self.name], self._siblings.failed = self, False
        self._siblings.waits = stage == "fit"
        self._told.clear()
        self.editor.ranks = self._siblings.ranks
        self.probes.check()
        if self.target is not None:
            datamodule = getattr(trainer, "datamodule", None)
            self.target.check(self.probes.files, any(hasattr(s, "probe_dataloader") for s in (pl_module, datamodule)))
        self._in_fit, self._given_up, self._said = stage == "fit", None, {}
        self._length, self._started, self._copies = RunLength(), time.monotonic(), {}
        self._validates = (stage == "validate" and not self._fitted) or (stage == "fit" and self.loop == "validation")
        if self._validates:
            check_validation(self.editor.ranks, pl_module, getattr(trainer, "datamodule", None))
        if stage == "validate" and not self._validates:
            return  # the factors of the fit stay
        self._renew = True
        if self._validates:
            # Inference tensors can never enter a graph, and the mode is entered before any hook of a callback runs.
            loop: Any = trainer.validate_loop if stage == "validate" else trainer.fit_loop.epoch_loop.val_loop
            self._stack.callback(setattr, loop, "inference_mode", loop.inference_mode)
            loop.inference_mode = False

    def _prepare(self, pl_module: pl.LightningModule) -> WindowedFactors | None:
        """Return the collection of this run, chosen when the module has been built (``configure_model``).

        Lazy layers have no shape yet: the collection begins with the first batch that finds them built.
        """
        if self._renew and self._next is None and not self._given_up and not has_lazy(pl_module):
            collector = Collector(pl_module, **self._options, ranks=self.editor.ranks, shard=self.shard_factors)
            self._next = WindowedFactors(collector, self.window, self._settings, self.every)
        return self._next if self._renew else self._collection

    def _begin(self, pl_module: pl.LightningModule) -> WindowedFactors | None:
        """Let the collection of this run take the place of an earlier one's; None if layers are lazy still."""
        collection = self._prepare(pl_module)
        if self._renew and collection is not None:
            collection.collector.on_error = self._met if self._in_fit else None
            self._kept = KroneckerFactors()
            self._collection, self._next, self._renew = collection, None, False
            self._fitted = False
            self.report = self.match = None
            self._validated, self.probe_results = None, {}
            self._weights = WeightWatch(collection.collector.weights)
        return collection

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Choose layers, and check the probes. Lightning calls it when module and data are set up, before any step.

        Raises:
            ValueError: If an argument does not fit the module. A preset that has no layers in it costs a warning.
        """
        try:
            self._prepare(pl_module)
        except PresetError as error:  # the network is not one for it, which is no mistake in an argument
            self._met(error)
        except (TypeError, ValueError):
            raise
        except Exception as error:  # noqa: BLE001  # of modules that are not what their class says
            self._met(error)
        self.probes.check_loaders(trainer, pl_module, self.target)

    @_never_ends_a_fit
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the validation steps, if this is where to collect. Lightning calls it before their first one."""
        if trainer.sanity_checking or not self._validates or self._given_up:
            return
        if not self._in_fit:
            self.probes.check_loaders(trainer, pl_module, self.target)
        collection = self._begin(pl_module)
        if collection is not None:
            collection.start(complete=False)
            self._watch.enter_context(collected_from(pl_module, collection.collector))

    @_never_ends_a_fit
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start to record the step, if it is due. Lightning calls it before each training step."""
        if self._weights is not None:
            self._weights.begin_step()
        if self.loop != "train":
            return
        last = self._length.last_batch(trainer)
        collection = self._begin(pl_module)
        self._due = collection is not None and collection.is_due(batches_before(trainer), last)
        if collection is not None and self._due and not self._given_up:
            collection.collector.open(batch)

    @_never_ends_a_fit
    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        """Take the step's gradients while its graph is alive. Lightning calls it before each backward pass."""
        if self._collection is None or self._given_up:
            return
        collector = self._collection.collector
        collector.before_backward(loss)
        if pl_module.automatic_optimization:  # otherwise training_step is still running, with modes of its own
            collector.stop()

    @_never_ends_a_fit
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the batch, and the window if it is full. Lightning calls it after each training step."""
        if self._collection is None:
            return
        try:
            collector = self._collection.collector
            if collector.is_open:
                self._collection.end_step(trainer.global_step)
            elif self._due and collector.shards:  # the other processes wait for what this one adds
                collector.accumulator.add(None, collector.kinds)
        finally:
            self._due = False
            if self._weights is not None:
                self._weights.end_step()

    @_never_ends_a_fit
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop a step that was cut short; without a validation, this is where a target's energy is searched.

        Lightning calls it after the last step of an epoch, and after the validation there.
        """
        collection = self._collection
        if collection is None:
            return
        collection.collector.abort()
        searches = self.target is not None and not trainer.enable_validation
        if searches and not self._out() and collection.synchronise():
            self._search(trainer, pl_module)

    @_never_ends_a_fit
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the factors of this validation; measure the probes before and after the edit, next to what is logged.

        Lightning calls it after the last step of a validation, before the module's own hook.

        Raises:
            RuntimeError: In ``Trainer.validate``, if not one validation batch could be collected.
        """
        if trainer.sanity_checking:
            return
        self._watch.close()
        if self._validates:
            self._end_validation(trainer, pl_module)
        elif self._out():
            return
        # After a fit the factors are known; its other processes need not be here.
        if self._collection is not None and (self.factors if self._fitted else self._collection.synchronise()):
            self._search(trainer, pl_module)
            results = self._run_probes(trainer, pl_module)
            if results:
                pl_module.log_dict(results)
        if self._validates and not self._in_fit:
            self._edit_live(pl_module)
            self._show(trainer, "Trainer.validate writes no checkpoint. An edit of these weights would do:")

    def _end_validation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the factors of a validation that ends."""
        collection = self._running()
        collection.collector.accumulator.drain()  # first of all: others may still add batches
        if self._out():
            return
        step = trainer.global_step
        if not self._in_fit and trainer.ckpt_path and self._siblings is not None:
            step = self._siblings.loaded_step if self._siblings.loaded_step is not None else step
        collection.collector.provenance |= {"loop": "validation", "step": step}
        silent = collection.silent
        collection.start(complete=True)
        if not collection.synchronise():
            raise NothingToCollectError(_NO_DATA.format("validation step computed a loss"))
        self._check_silent(silent, collection.collector.frozen)
        self._validated = weight_hashes(layer_weights(pl_module, self.factors))
        self._validated_swapped = self._weights is not None and self._weights.swapped()

    @_never_ends_a_fit
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Search a last time, work out what an edit does, and measure the probes. Lightning calls it after training."""
        collection = self._collection
        nothing = "training step ran a backward pass" if self.loop == "train" else "validation ran"
        if collection is None or self._renew:
            if collection is None and not self._given_up:
                rank_zero_warn(_NO_DATA.format(nothing))
            return
        collection.collector.accumulator.drain()
        if self._out():
            return
        if not collection.synchronise():
            rank_zero_warn(_NO_DATA.format(nothing))
            return
        self._fitted = True
        if self.loop == "train":
            self._check_silent(collection.silent, collection.collector.frozen)
            self._search(trainer, pl_module)
            results = self._run_probes(trainer, pl_module)
            for logger in trainer.loggers:
                logger.log_metrics(results, trainer.global_step)
        self._edit_live(pl_module)

    @_never_ends_a_fit
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit the checkpoints that are there, and show what was done. Lightning calls it last in a fit."""
        self._make_copies()
        if self._fitted and not (self._renew or self._given_up):
            step = trainer.global_step
            self._show(trainer, f"No checkpoint was edited. An edit of the weights at step {step} would do:")

    def _make_copies(self) -> None:
        """Make the edited copies that were left for the end of the fit; say what they take."""
        if self._siblings is None:
            return
        self._siblings.waits = False
        count, factors = self._siblings.num_waiting(self.name), self.factors
        if count and factors:
            kinds = self._running().collector.kinds
            on_gpu = torch.cuda.is_available()
            seconds = sum(edit_seconds(kinds[name].d_out, kinds[name].d_in, on_gpu) for name in factors)
            trained = time.monotonic() - self._started
            if count * seconds > _TENTH * trained:
                rank_zero_info(
                    f"KFACEditCallback edits {count} checkpoint{'s' * (count > 1)} now, at about {seconds:.2g} s each "
                    f"by the size of the layers; training took {trained:.0f} s. Keep fewer checkpoints, or edit fewer "
                    "or smaller layers, if that is too long."
                )
        self._siblings.make_copies(self.name)

    def _check_silent(self, silent: list[str], frozen: set[str]) -> None:
        """Tell of chosen layers that have no factors; in a fit they stay as they are, and the others are edited."""
        if not silent:
            return
        if self._in_fit or self.editor.skip_faulty:
            asleep = sorted(set(silent) & frozen)
            why = f" (the outputs of {listing(asleep)} needed no gradient: frozen)" if asleep else ""
            rank_zero_warn(f"Chosen layers {listing(silent)} never ran{why}, and stay as they are.")
        else:
            check_silent(silent, frozen)

    def _search(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the energy of the target, if there is one."""
        if self.target is None:
            return
        self.match = self.probes.match(trainer, pl_module, self.editor.at(1.0), self.factors, self.target)
        if self.match is None:
            return
        self.editor.energy = self.match.energy
        rank_zero_info(f"{self.target}: energy {self.match.energy:.4g}, {self.match.value:.4f} times")

    def _edit_live(self, pl_module: pl.LightningModule) -> None:
        """Work out what an edit of the live weights does; they stay as they are."""
        if self._undecided:
            return
        try:
            self.report = self.editor.edited_weights(pl_module, self.factors)[1]
        except FaultyLayerError as error:
            rank_zero_warn(f"There is no edit of the weights at the end: {error}")

    def _show(self, trainer: pl.Trainer, nothing_written: str) -> None:
        """Show what was edited in which file, and what the probes say; save the factors."""
        reports = [entry for entry in self._copies.items() if not _is_gone(entry[0])]
        if reports:
            copy, report = reports[-1]
            rank_zero_info(f"\n{copy}:\n{report}")
            if len(reports) > 1:
                others = listing(other for other, _ in reports[:-1])
                rank_zero_info(f"Edited likewise, with the factors of their steps: {others}.")
        elif self.report is not None:
            rank_zero_info(f"\n{nothing_written}\n{self.report}")
        if self.probe_results:
            rank_zero_info(f"\n{before_after(self.probe_results)}")
        if (path := self.save_factors) is not None:
            gathered = self.factors.gathered()
            try:
                self.editor.ranks.first(lambda: gathered.save(path))
                rank_zero_info(f"Factors written to {path}.")
            except (OSError, ValueError) as error:
                rank_zero_warn(f"save_factors: the factors could not be written to {path}: {error}")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish a batch that has ended for Lightning, which does not run it again, and remove every hook.

        Lightning calls it when a run stops by an error or a signal.
        """
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        try:
            if self._collection is not None and trainer.training and batches.processed == batches.ready:
                self._collection.end_interrupted(trainer.global_step)
            if self._siblings is not None:
                self._siblings.failed = True
                if self._siblings.ranks.all_here():
                    self._make_copies()
        except Exception as error:  # noqa: BLE001  # the error that ends the run is the one to be seen
            self._met(error)
        self._clean_up()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove every hook. Lightning calls it when a run has ended."""
        self._clean_up()

    def _clean_up(self) -> None:
        with ExitStack() as stack:  # each is done, whatever becomes of the others
            for collection in (self._collection, self._next):
                if collection is not None:
                    stack.callback(collection.collector.abort)
            stack.callback(self._watch.close)
            stack.callback(self._stack.close)
        self._in_fit = False
        if self._siblings is not None:
            self._siblings.waits = False

    def _running(self) -> WindowedFactors:
        if self._collection is None:
            raise RuntimeError("KFACEditCallback.setup was not called; use the callback in a Trainer.")
        return self._collection

    def _of_this_module(self) -> WindowedFactors | None:
        """Return the collection, if it is one of the module that the latest run is about."""
        collection = self._collection
        return collection if collection is not None and collection.collector.module is self._module else None

    def _met(self, error: Exception) -> None:
        """Say what an error costs, and go on without what it is about."""
        if isinstance(error, NothingToCollectError):
            if str(error) not in self._said:
                self._said[str(error)] = None
                rank_zero_warn(f"KFACEditCallback collected nothing from a step, and training goes on: {error}")
            return
        if self._given_up is None:
            self._given_up = str(error) or type(error).__name__
            rank_zero_warn(
                f"KFACEditCallback stops, and training goes on: {self._given_up} Checkpoints that are saved from now "
                "on have no edited copy."
            )

    def _out(self) -> bool:
        """Tell whether any process has given up. A collective."""
        reasons = [reason for reason in self.editor.ranks.gather(self._given_up) if reason]
        if reasons and self._given_up is None:
            self._given_up = reasons[0]
        return bool(reasons)

    def state_dict(self) -> dict[str, Any]:
        """Return what tells a resumed run that the factor file beside the checkpoint belongs to it; primitives."""
        collection = self._of_this_module()
        state = {} if collection is None else collection.state_dict()
        if self.target is not None and self.match is not None:
            state["match"] = {"target": self.target.entry, "energy": self.match.energy, "value": self.match.value}
        return {"name": self.name, **state} if state else {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on collecting where the run that saved the checkpoint was. Lightning calls it before a fit goes on."""
        if trainer.state.fn == "fit" and (note := checkpoint_note(checkpoint)) is not None:
            rank_zero_warn(f"Training goes on from {trainer.ckpt_path}. {note}")
        # By name: the state key changes with every setting, also with those that the factors do not depend on.
        kind = type(self).__qualname__
        states = [s for key, s in checkpoint.get("callbacks", {}).items() if str(key).startswith(kind)]
        state = next((state for state in states if state.get("name") == self.name), None)
        if trainer.state.fn != "fit" or not state or self._siblings is None:
            return
        try:
            collection = self._prepare(pl_module)
            reason: str | None = "its layers are lazy, and have no shape yet"
            if collection is not None:
                with self._siblings.loaded_factors(self.name) as file:
                    reason = collection.resume(state, file)
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
        match = state.get("match")
        if match and self.target is not None and match["target"] == self.target.entry:
            self.match = Match(match["energy"], match["value"], {match["energy"]: match["value"]})
            self.editor.energy = self.match.energy

    def factors_writer(self) -> Callable[[Path], None] | None:
        """Return what writes the factors to a file beside a checkpoint; None if there are none yet."""
        collection, ranks = self._of_this_module(), self.editor.ranks
        # Those of a run that other processes took part in cannot be had any more.
        if collection is None or collection.ranks is not ranks or self._out():
            return None
        snapshot = collection.snapshot()
        return None if snapshot is None else lambda path: snapshot[0].save(path, snapshot[1])

    def edit_later(self, checkpoint: CheckpointDict) -> Edit | None:
        """Return what makes the edited copy of a checkpoint; None, with a warning, if there is none that is right."""
        factors = KroneckerFactors() if self._of_this_module() is None else self.factors
        step = checkpoint["global_step"]
        if self._out():
            return None  # which was told when it happened
        if not factors and not self._validates:
            return None
        if not factors:
            reason: str | None = "it was saved before the first validation"
        elif self._undecided:
            reason = (
                f"it was saved before the energy for {self.target} was searched, which is done when validation ends"
            )
        else:
            try:
                reason = self._why_no_copy(checkpoint, factors)
            except ValueError as error:
                reason = str(error).rstrip(".")
        if reason is not None:
            self._tell_no_copy(step, reason)
            return None
        return LaterEdit(self.editor.at(self.editor.energy), factors, self._copies)

    def _tell_no_copy(self, step: int, reason: str) -> None:
        """Say why a checkpoint has no edited copy; once for each reason, whatever steps and values it names."""
        kind = re.sub(r"[\d.]+", "", reason)
        if kind not in self._told:
            self._told.add(kind)
            rank_zero_warn(
                f"The checkpoint of step {step} has no edited copy: {reason}. Later ones that have none for "
                "the same reason are not told."
            )

    def _why_no_copy(self, checkpoint: CheckpointDict, factors: KroneckerFactors) -> str | None:
        collector, weights = self._running().collector, self._weights
        measured = Measured(
            live=lambda: layer_weights(collector.module, factors),
            validated=self._validated,
            step=factors.provenance.get("step"),
            swapped=self._validated_swapped or (weights is not None and weights.swapped()),
            averages=self._averages,
        )
        return why_no_copy(checkpoint, factors, measured, self.editor.ranks)

    def _run_probes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, float]:
        """Return the probes' results under ``curvature/{probe}/{metric}/before|after``."""
        results: dict[str, float] = {}
        if not self._undecided:
            try:
                results = self.probes.measure(trainer, pl_module, self.editor, self.factors)
            except Exception as error:
                if not self._in_fit:
                    raise
                rank_zero_warn(f"A probe could not be measured, and the run goes on without: {error}")
        group = "curvature" if self.name == "edited" else f"curvature-{self.name}"
        self.probe_results = {f"{group}/{name}": value for name, value in results.items()}
        return self.probe_results

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the callback holds: its settings and its results, nothing of a run that goes on."""
        rest = object.__new__(type(self))
        vars(rest).update(vars(self))
        factors = self.factors if self.editor.ranks.size == 1 else KroneckerFactors()
        results = {name: getattr(self, name) for name in ("report", "match", "probe_results")}
        rest._reset()
        rest.editor = self.editor.at(self.editor.energy)
        rest.editor.ranks, rest.editor._known = Ranks(), None
        vars(rest).update(results, _kept=factors, probes=Probes(self.probes.files))
        for name in ("log", "log_dict"):  # methods of the module, which Lightning puts here
            vars(rest).pop(name, None)
        return vars(rest)
