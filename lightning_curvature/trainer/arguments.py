"""The arguments of the callback."""

import dataclasses
import re
from abc import abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_curvature._checks import check_count, check_option
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.reference import Reference
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.selection import default_layers
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.trainer.price import MeasuredPrice
from lightning_curvature.trainer.probes import Probes
from lightning_curvature.trainer.target import Target

LOOPS = ("auto", "train", "validation")


class CallbackArguments(Callback):
    """Arguments of :class:`~lightning_curvature.KFACEditCallback`, and what follows from them alone."""

    def __init__(
        self,
        layers: str | list[str] | None = None,
        energy: float | dict[str, float] | None = None,
        fisher: str = "sketched",
        draws: int = 1,
        positions: str = "contributing",
        window: int | None = None,
        every: int = 8,
        share: float = 1.0,
        loop: str = "auto",
        logits: str | None = None,
        class_dim: int | None = None,
        probes: dict[str, Any] | None = None,
        accumulate_on: str = "auto",
        save_factors: str | None = None,
        name: str = "edited",
        seed: int = 0,
        score: str = "kfac",
        soft: bool | None = None,
        target: dict[str, float] | None = None,
        shard_factors: bool = False,
        skip_faulty: bool = False,
        min_positions: int | None = None,
        budget: float | None = None,
        reference: str | None = "auto",
        factors: str | None = None,
        scope: str | None = None,
        recalibrate: bool = True,
    ) -> None:
        """Check the arguments.

        Args:
            layers: What to edit: presets ``"last-mlp"``, ``"mlp"``, ``"attention"``, ``"linear"``, fnmatch patterns on
                module names, or a list of them. Default for a fine-tuned model (see ``reference``): ``"linear"``, all
                linear layers and convolutions. Default otherwise: ``"mlp"`` with more than six blocks, else
                ``"last-mlp"``; the callback then tries ``"linear"``, too, and takes the better edit, see ``energy``.
                With ``factors``: patterns that choose layers of that file, by their names in the module; by default
                all.
            energy: Share of the curvature mass that the edit keeps, in (0, 1], or a dict of layer patterns to shares.
                Without ``energy``, ``budget`` and ``target`` the callback measures edits at the end of fit, on batches
                of the last validation, and takes the strongest one within a price:

                - the loss of a token may be 0.02 nats above the lowest loss among the edits tried;
                - the loss of a classifier may be a tenth of the unedited model's, and at most 0.05, above its lowest
                  value, and its error half a point (or one standard error, if that is larger) above the unedited
                  model's;
                - half of a squared error may be 4 % above its lowest value;
                - without a validation that computes such a loss the edit has a fixed predicted cost: 0.02 nats for one
                  layer, 0.002 for several, 0.0003 if it is soft, since predictions are too low for several layers. For
                  squared errors, whose unit is the user's, these mean little: give a strength.

                A model that was not fine-tuned gets the edit that closes most of the gap between training and
                validation batches, within limits of :mod:`lightning_curvature.search.gap`, unless ``layers``, ``soft``,
                ``scope`` or ``factors`` is given, or ``loop`` is ``"validation"``.
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
            loop: Where to collect during fit: ``"train"``, or ``"validation"``. By default training steps; but where
                updates are edited at a measured price, the validation batches that measure it, when training ends, and
                training steps only if these are too few. The steps of a fine-tune hold what it is to forget, and an
                edit keeps what its factors come from.
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
            soft: Shrink directions of low score instead of dropping them; by default where updates are edited and no
                ``energy`` is given.
            target: Instead of an energy, what the edit may cost: ``{"clean/perplexity": 1.1}`` is the strongest edit
                that raises the perplexity of the probe ``clean`` to at most 1.1 times what it was, ``{"val/accuracy":
                0.99}`` one that keeps 0.99 of an accuracy; of several entries none is exceeded. The energy, or the
                budget of a soft edit of updates, is searched for at the end of each validation (each epoch where there
                is none) and of fit, on these probes; look at another one for what the edit costs. Checkpoints that are
                saved later get the edit of the latest search, and those before the first one have no edited sibling.
            shard_factors: With several processes, spread the sums of the factors over them: each keeps those of some
                layers, and receives what the others add in every step. Less memory, more traffic.
            skip_faulty: Leave layers that cannot be edited (NaN, factors of zero) as they are, with a warning, and edit
                the others, instead of leaving no edited checkpoint.
            min_positions: Positions that the factors of a layer must rest on, or it is left as it is; None: as many as
                its live inputs and outputs, 0: edit it whatever they rest on.
            budget: Instead of an energy: what the edit is predicted to cost over all its layers, in nats.
            reference: Edit the update since a reference, and keep what the reference has: ``"start"`` for the weights
                that the run began with, which are kept on the CPU and in every checkpoint, or the path of a checkpoint,
                of which nothing is kept. For fine-tuning: what a fine-tune memorized lies in its update. ``"auto"`` is
                ``"start"`` where a fit begins with trained weights (see :mod:`lightning_curvature.layers.trained`) and
                no ``energy`` is given; otherwise, and with None, the weights are edited. LoRA adapters are updates, and
                need no reference.
            factors: File of factors to edit with, in the place of collecting any: those of the model that a fine-tune
                starts from, for example. Training does nothing more then.
            scope: Which weights compete with each other. ``"layer"``: each layer keeps the same share of its own
                curvature mass. ``"model"``: one threshold for all layers. Default: ``"layer"`` with ``energy``, and
                ``"model"`` with ``budget`` or without a strength.
            recalibrate: Estimate mean and variance of batch norms again after the edit, on up to 32 training batches
                from the start of the last epoch, of which copies are kept on the CPU; no labels. Frozen batch norms
                are left alone. Without it the old statistics stay, which usually harms networks with batch norms.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If an argument is none of its options.
            FileNotFoundError: If there is no file of factors.
        """
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"name must be a part of a file name (letters, digits, '_', '-', '.'), found {name!r}.")
        if score == "ekfac":
            raise ValueError("score='ekfac' needs a second pass over the data: collect, correct_eigenvalues, edit.")
        self.name = name
        if sum(given is not None for given in (energy, target, budget)) > 1:
            raise ValueError("energy, target and budget each say how strong the edit is: give one of them.")
        if factors is not None and save_factors is not None:
            raise ValueError("With factors= nothing is collected that save_factors= could save: give one of them.")
        self.price = MeasuredPrice() if energy is None and target is None and budget is None else None
        self.factors_file = None if factors is None else Path(factors)
        if self.factors_file is not None and not self.factors_file.is_file():
            raise FileNotFoundError(f"factors: there is no file {factors}.")
        self._finds_reference = reference == "auto" and energy is None
        self.keeps_start = reference == "start"
        self._reference = None if reference in ("auto", "start", None) else Reference(reference)
        patterns = [layers] if isinstance(layers, str) else layers
        self.editor = CurvatureEditor(
            1.0 if target is not None else energy,
            layers=None if factors is None else patterns,
            score=score,
            skip_faulty=skip_faulty,
            min_positions=min_positions,
            budget=budget if self.price is None else self.price.predicted,
            scope=scope,
        ).based_on(self._reference)
        self._layers, self._soft = layers, False if soft is None and energy is not None else soft
        self.options = CollectorOptions(
            None, fisher, draws, positions, logits, class_dim, accumulate_on, share, score == "coupled", seed
        )
        self.target = None if target is None else Target(target)
        self.recalibrate = recalibrate
        self._chooses_layers = self.price is not None and (layers, soft, factors, scope) == (None, None, None, None)
        self._chooses_layers &= loop in ("auto", "train")
        self._use_defaults(self.keeps_start or self._reference is not None)
        self.shard_factors = shard_factors
        self.window = None if window is None else check_count(window, "window")
        self.every = check_count(every, "every")
        self.loop = check_option(loop, LOOPS, "loop")
        self.probes = Probes(probes or {})
        self.save_factors = save_factors
        self._start_anew(KroneckerFactors())

    def _use_defaults(self, updates: bool, module: nn.Module | None = None) -> None:
        """Set what follows from what is edited, unless it was given.

        Args:
            updates: Whether updates are edited, of a fine-tune or an adapter, and not weights.
            module: The module, once there is one.
        """
        layers = self._layers
        if layers is None and module is not None:
            layers = "linear" if updates else default_layers(module)
        self.options = dataclasses.replace(self.options, layers=layers)
        self.editor.use_soft(updates if self._soft is None else self._soft)
        if self.price is not None:
            self.price.of_updates = updates
        if self.target is not None:
            self.target.of_updates = updates

    @abstractmethod
    def _start_anew(self, factors: KroneckerFactors) -> None:
        """Reset to the state before any run; the factors given are kept."""

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; it differs where any setting does."""
        strength: Any = self.editor.energy
        if self.target is not None:
            strength = self.target.entry
        elif self.price is not None or self.editor.budget is not None:
            strength = "price" if self.price is not None else f"budget {self.editor.budget:g}"
        given = {**self._settings, "layers": self._layers}  # the default is not known before a run
        return self._generate_state_key(name=self.name, energy=strength, **given)

    @property
    def _settings(self) -> dict[str, Any]:
        """What a run that goes on with the factors of another one must have in common with it."""
        loop = "validation" if self.loop == "validation" else "train"
        return {**self.options.settings, "loop": loop, "window": self.window}
