"""Collection: from one step of a model to sums of its K-FAC factors.

A :class:`Collector` is opened around a forward pass, told when a backward pass is about to start, and closed. It
knows nothing of trainers; :func:`lightning_curvature.collect.collect` runs it over a frozen model, ``KFACEditCallback``
inside a training loop.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_curvature._checks import check_count, check_option, check_share, listing
from lightning_curvature.collect.accumulator import Accumulator, owners_of
from lightning_curvature.collect.plan import place_sums
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.fingerprints import fingerprint
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import is_conv1d, matrix_shape
from lightning_curvature.layers.selection import LayerChoice, choose_layers
from lightning_curvature.recording import fisher
from lightning_curvature.recording.compiled import check_graphed, is_compiled
from lightning_curvature.recording.fisher import FISHER_KINDS
from lightning_curvature.recording.objectives import NothingToCollectError, frozen_layers
from lightning_curvature.recording.positions import batch_mask, check_positions
from lightning_curvature.recording.step import FisherOptions, Step
from lightning_curvature.recording.taps import Taps, named_target

ACCUMULATE_ON = ("auto", "model", "cpu")


def check_options(fisher: str, draws: int, positions: str, accumulate_on: str, share: float) -> None:
    """Raise ``ValueError`` if an argument of :class:`Collector` that needs no network is none of its options."""
    check_share(share, "share")
    check_option(fisher, FISHER_KINDS, "fisher")
    check_count(draws, "draws")
    check_positions(positions)
    check_option(accumulate_on, ACCUMULATE_ON, "accumulate_on")


def check_class_dim(class_dim: Any, logits: str | None) -> None:
    """Raise if ``class_dim`` is no dimension, or there are no named logits that it could be one of.

    Raises:
        TypeError: If it is no integer.
        ValueError: If ``logits`` is None.
    """
    if class_dim is None:
        return
    if isinstance(class_dim, bool) or not isinstance(class_dim, int):
        raise TypeError(f"class_dim must be an integer or None, found {class_dim!r}.")
    if logits is None:
        raise ValueError(
            "class_dim says which dimension of named logits holds the classes: name them with logits='...'."
        )


class Collector:
    """Collects K-FAC factors from the steps of a model.

    Args:
        module: The network; layer names are relative to it.
        layers: Presets or name patterns, see :mod:`lightning_curvature.layers.selection`.
        fisher: Kind of Fisher, see :mod:`lightning_curvature.recording.fisher`.
        draws: Random vectors (labels) per loss position, for ``"sketched"`` (``"sampled"``).
        positions: Which positions count, see :mod:`lightning_curvature.recording.positions`.
        seed: Seed of the collector's own random generator.
        logits: Name of a submodule or method that returns the logits, for models that hide their cross-entropy: a
            tensor ``[batch, classes]``, or one of more dimensions whose classes the softmax of the loss tells.
        class_dim: Dimension of the classes of these logits, where the loss does not tell: 1 for
            ``[batch, classes, ...]``, -1 for ``[batch, ..., classes]``.
        accumulate_on: Where the sums live: ``"model"``, on the device of each layer; ``"cpu"``; or ``"auto"``, on the
            device of each layer if they fit there, and otherwise on the CPU.
        share: Share of the positions that is used, in (0, 1], chosen at random in each batch.
        coupled: Also sum the norm-weighted moments that the score ``"coupled"`` needs, see
            :mod:`~lightning_curvature.editing.scores`: twice the memory and the products.
        group: ``(i, n)``: cut the chosen layers into n groups and collect the i-th (from 0) alone, where all of them
            together do not fit into memory.
        ranks: The processes of the run; by default this one alone.
        shard: Spread the sums over the processes: each keeps those of its own layers.
        on_error: Called with an error that was met inside the step that is watched, in place of raising it there.

    Attributes:
        chosen: Names of the chosen layers; None before the first batch has shown them.
        frozen: Those that ran and needed no gradient.
        left_out: Why backward passes of steps that were used otherwise were passed over, and how many.

    Raises:
        ValueError: If an argument is none of its options, or ``layers`` matches nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: str | Sequence[str] = "last-mlp",
        *,
        fisher: str = "sketched",
        draws: int = 1,
        positions: str = "contributing",
        seed: int = 0,
        logits: str | None = None,
        class_dim: int | None = None,
        accumulate_on: str = "auto",
        share: float = 1.0,
        coupled: bool = False,
        group: tuple[int, int] = (0, 1),
        ranks: Ranks | None = None,
        shard: bool = False,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        check_options(fisher, draws, positions, accumulate_on, share)
        check_class_dim(class_dim, logits)
        if logits is not None:
            named_target(module, logits)
        self.module = module
        self.fisher = fisher
        self.draws = draws
        self.positions = positions
        self.choice: LayerChoice = choose_layers(module, layers)
        self.chosen: list[str] | None = None
        self.detaches: bool | None = None
        self.frozen: set[str] = set()
        self.left_out: dict[str, int] = {}
        self.provenance: dict[str, Any] = {
            "model": type(module).__name__,
            "fisher": fisher,
            "draws": draws,
            "positions": positions,
            **({"share": float(share)} if share < 1 else {}),
        }
        self.ranks = Ranks() if ranks is None else ranks
        self.seed = seed
        self.logits = logits
        self.accumulate_on = accumulate_on
        self.share = float(share)
        self.coupled = coupled
        self.group = group
        self.on_error = on_error
        self.kinds = {name: self._kind(module) for name, module in self.choice.modules.items()}
        owners = owners_of(self.kinds, self.ranks) if shard else None
        check_graphed(module)
        self.accumulator = Accumulator(self._new_sums, self._home, positions, self.ranks, owners)
        self._options = FisherOptions(fisher, draws, logits, class_dim)
        self._homes: dict[torch.device, torch.device] = {}
        self._unchecked = set(self.choice.modules)
        self._step: Step | None = None
        self._opened = False
        self._disturbed: bool | None = None

    @contextmanager
    def step(self, batch: Any = None) -> Iterator[None]:
        """Collect from the step of a frozen model that runs inside a ``with`` block, which calls :meth:`backward`.

        Args:
            batch: The batch, needed for ``positions="mask:KEY"`` alone.

        Raises:
            RuntimeError: As :meth:`before_backward` and :meth:`close`.
        """
        self.open(batch)
        try:
            yield
            self.close()
        finally:
            self.abort()

    def open(self, batch: Any = None) -> None:
        """Start to record; call before the forward pass.

        Args:
            batch: The batch, needed for ``positions="mask:KEY"`` alone.
        """
        self.abort()
        mask = None
        if self.positions.startswith("mask:"):
            mask = batch_mask(batch, self.positions.removeprefix("mask:"))
        if not self._opened and is_compiled(self.module):
            rank_zero_warn(
                "Steps from which curvature is collected run without torch.compile: what was compiled before hooks "
                "were there never calls them. To keep training compiled, collect in validation (loop='validation')."
            )
        self._opened = True
        names = self.choice.modules if self.chosen is None else self.chosen
        taps = Taps(
            self.module,
            {name: self.choice.modules[name] for name in names},
            logits=self.logits,
            watch_gradients=self.fisher == "empirical",
            on_backward=self.before_backward,
            on_error=None if self.on_error is None else self._hand_over,
            unchecked=self._unchecked,
        )
        parameters = frozenset(map(id, self.module.parameters()))  # which the module keeps alive
        self._step = Step(taps, self, self._options, parameters, self._seed, mask)
        taps.__enter__()

    def before_backward(self, objective: Tensor | None) -> None:
        """Take the gradients of a backward pass; call when the forward pass is done and its graph is alive.

        A pass that goes through no softmax loss, or reaches no chosen layer, is passed over.

        Args:
            objective: What the training is about to backpropagate; None if the step has none, and computes one
                cross-entropy.

        Raises:
            RuntimeError: If the logits cannot be told, the factors do not fit into memory, or ``exact`` is too
                expensive.
        """
        if self._step is not None:
            self._step.before_backward(objective)

    def choose(self, fired: Sequence[str], heads: Collection[str], dead: Collection[str]) -> None:
        """Choose layers, given those that ran in the first batch; see :class:`.step.Layers`.

        Raises:
            NothingToCollectError: If none of those that are meant ran in this batch.
            DoesNotFitError: If their factors do not fit into memory.
        """
        try:
            chosen = self.choice.resolve(fired, heads, dead)
        except RuntimeError as error:
            self.frozen |= set(dead)
            raise NothingToCollectError(frozen_layers(dead) if dead else str(error)) from error
        self.chosen = self._plan(chosen)
        late = set(self.chosen) - set(fired)
        for names, lack in ((late - set(dead), "did not run"), (late & set(dead), "ran without gradients (frozen?)")):
            if names and late != set(self.chosen):  # where nothing is left, the step itself says so
                rank_zero_warn(
                    f"Chosen layers {listing(sorted(names))} {lack} in the first collected batch. They are collected "
                    "from whenever they run with gradients; if they never do, they are not edited."
                )

    def before_passes(self, count: int) -> None:
        """Raise if a batch needs too many backward passes; say what ``exact`` costs."""
        if count > fisher.EXACT_LIMIT:
            raise RuntimeError(
                f"fisher='exact' needs {count} backward passes for this batch, the limit is {fisher.EXACT_LIMIT}. "
                "Use fisher='sketched', whose expectation is the same, with as many draws as you can afford."
            )
        if self.fisher == "exact" and self.accumulator.num_seen == 0:
            rank_zero_info(f"fisher='exact' takes {count} backward passes per batch.")

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Run backward passes that leave buffers and ``.grad`` as they were.

        Activation checkpointing calls modules again in a backward pass, and functions of other people's may write into
        ``.grad`` there. Whether this model does so is found in the first batch.
        """
        if self._disturbed is False:
            yield
            return
        places = [(module, name) for module in self.module.modules() for name in module._buffers]
        buffers = [
            (*place, buffer, buffer.detach().clone())
            for place in places
            if (buffer := place[0]._buffers[place[1]]) is not None
            and buffer.layout is torch.strided
            and not (buffer.is_inference() or buffer.is_meta)
        ]
        grads = [(parameter, parameter.grad) for parameter in self.module.parameters()]
        try:
            for parameter, _ in grads:
                parameter.grad = None
            yield
        finally:
            changed = any(parameter.grad is not None for parameter, _ in grads)
            for parameter, grad in grads:
                parameter.grad = grad
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    if module._buffers.get(name) is not buffer:
                        module._buffers[name], changed = buffer, True
                    if not torch.equal(buffer, before):  # batch normalisation leaves the version counter as it was
                        buffer.copy_(before)
                        changed = True
            self._disturbed = bool(self._disturbed) or changed

    def stop(self) -> None:
        """Record nothing more, where the rest of the step (the optimizer's) is known to hold nothing of interest."""
        if self._step is not None:
            self._step.taps.close()

    def backward(self, objective: Tensor | None) -> None:
        """Take the gradients where no training backward follows: weights and ``.grad`` are left alone."""
        step = self._step
        if step is None:
            return
        if self.fisher == "empirical" and objective is None and len(step.taps.losses) == 1:
            (loss,) = step.taps.losses
            objective = None if loss.output is None else loss.output.sum()
        self.before_backward(objective)
        if self.fisher == "empirical" and step.edges and objective is not None:
            with torch.autocast(objective.device.type, enabled=False), step.taps.own_pass():
                # The tensor hooks keep what passes; another collector may need the graph, too.
                torch.autograd.grad(objective, step.edges, retain_graph=True, allow_unused=True)

    def close(self) -> None:
        """Finish the batch; call after the backward pass. A collective where the sums are sharded.

        Raises:
            NothingToCollectError: If backward passes ran, and nothing could be collected from any.
            RuntimeError: If the training sent no gradient to the chosen layers.
        """
        step, batch, failure = self._step, None, None
        try:
            if step is not None:
                try:
                    batch = step.finish()
                    if batch is None:
                        failure = self._why_nothing(step)
                except RuntimeError as error:
                    failure = error
                self._note(step, batch is not None)
                self.stop()  # nothing looks at the functions that add the batch
            if batch is not None:
                batch.share, batch.seed = self.share, self._seed
            self._step = step = None  # its graph goes before the batch is added
            self.accumulator.add(batch, self.kinds)
        finally:
            self.abort()
        if failure is not None:
            raise failure

    def _note(self, step: Step, used: bool) -> None:
        """Keep what a step that ends has shown beside its gradients."""
        self.frozen |= step.frozen
        if used:
            for reason in step.passed_over:
                if reason not in self.left_out:
                    rank_zero_info(f"A backward pass of a collected step was left out: {reason}")
                self.left_out[reason] = self.left_out.get(reason, 0) + 1

    def _why_nothing(self, step: Step) -> RuntimeError | None:
        """Return the error of a step that gave nothing; None if it ran no backward pass that was seen."""
        if step.failed:
            return None
        if step.passed_over:
            return NothingToCollectError(step.passed_over[0])
        if step.taps.losses:
            return NothingToCollectError(
                "A training step computed a cross-entropy, and no backward pass of it was seen, so nothing was "
                "collected from it. In manual optimization call self.manual_backward(loss) or loss.backward(); "
                "torch.autograd.backward and torch.autograd.grad are not seen."
            )
        return None

    def abort(self) -> None:
        """Drop whatever is recorded of the current batch, and every hook."""
        if self._step is not None:
            self._step.taps.close()
            self._step = None

    def _hand_over(self, error: Exception) -> None:
        """Take nothing more from a step in which an error was met, and hand the error to who asked for it."""
        if self._step is not None:
            self._step.failed = True
        if self.on_error is not None:
            self.on_error(error)

    @property
    def sums(self) -> Mapping[str, LayerSums]:
        """The running sums that this process keeps, by layer."""
        return self.accumulator.sums

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the chosen layers as they are now; of all that may be chosen before the first batch."""
        names = self.choice.modules if self.chosen is None else self.chosen
        return {name: self.choice.modules[name].get_parameter("weight") for name in names}

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Hand an error of a ``with`` block to ``on_error``, if there is one; the step gives nothing then."""
        try:
            yield
        except Exception as error:
            if self.on_error is None:
                raise
            self._hand_over(error)

    @property
    def is_open(self) -> bool:
        """Whether a batch is being collected."""
        return self._step is not None

    @property
    def holds_batch(self) -> bool:
        """Whether the gradients of a batch were taken, and not added yet."""
        return self._step is not None and self._step.holds_gradients

    @property
    def shards(self) -> bool:
        """Whether each process keeps the sums of its own layers alone."""
        return self.accumulator.owners is not None

    @property
    def silent(self) -> list[str]:
        """Chosen layers that have not run in any batch since the last reset, as far as this process knows."""
        return [name for name in self.chosen or [] if name not in self.accumulator.num_positions]

    def factors(self) -> KroneckerFactors:
        """Return the factors of all batches since the sums were last reset."""
        return KroneckerFactors({name: sums.factors() for name, sums in self.sums.items()}, self._facts)

    def finish(self) -> KroneckerFactors:
        """Return the same factors, and drop the sums one by one, so that the two are never there as a whole."""
        modules, layers = self.choice.modules, self.accumulator.take()
        for name, layer in layers.items():  # whoever finishes has not trained meanwhile, as a callback does
            layers[name] = dataclasses.replace(layer, weight=fingerprint(modules[name].weight))
        return KroneckerFactors(layers, self._facts)

    @property
    def _facts(self) -> dict[str, Any]:
        return {**self.provenance, "batches_skipped": self.accumulator.num_skipped}

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted collection needs to go on as if nothing had happened: tensors and primitives.

        A collective; what comes back on the first process holds the sums of all.
        """
        return {"chosen": self.chosen, **self.accumulator.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the sums move to their layers' device with the next batch."""
        self.chosen = state["chosen"]
        self.accumulator.load_state_dict(state)

    def _plan(self, chosen: list[str]) -> list[str]:
        """Return the layers of this collector's group, having checked that their factors fit into memory."""
        index, count = self.group
        if count > len(chosen):
            raise ValueError(
                f"{len(chosen)} layers cannot be cut into {count} groups; use at most {len(chosen)} passes."
            )
        group = [name for i, name in enumerate(chosen) if i * count // len(chosen) == index]
        for device in {self.choice.modules[name].weight.device for name in group}:
            self._home(device, group)
        return group

    def _home(self, device: Any, chosen: Sequence[str] = ()) -> torch.device:
        """Return where the sums of the layers on a device live, having checked that they fit there."""
        device = torch.device(device)
        if device not in self._homes:
            owners = self.accumulator.owners
            shapes = {
                name: (self.kinds[name].d_out, self.kinds[name].d_in)
                for name in self.chosen or chosen
                if self.choice.modules[name].weight.device == device
                and (owners is None or owners[name] == self.ranks.rank)
            }
            self._homes[device] = place_sums(shapes, device, self.accumulate_on)
        return self._homes[device]

    @property
    def _seed(self) -> int:
        """Seed of this batch: the same one if the batch is repeated, another one on other data."""
        seed = self.seed * 0x9E3779B1 + self.ranks.data * 0x85EBCA77 + self.accumulator.num_seen
        return seed % 2**32

    def _kind(self, layer: nn.Module) -> LayerKind:
        d_out, d_in = matrix_shape(layer)
        return LayerKind(d_in, d_out, is_conv1d(layer), self.coupled)

    def _new_sums(self, name: str, kind: LayerKind, home: torch.device) -> LayerSums:  # noqa: ARG002
        return LayerSums.zero(kind, home)
