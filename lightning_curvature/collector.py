"""Collection: from one step of a model to sums of its K-FAC factors.

A :class:`Collector` is opened around a forward pass, told when the backward pass is about to start, and closed. It
knows nothing of trainers; :func:`lightning_curvature.collect.collect` runs it over a frozen model, ``KFACEditCallback``
inside a training loop.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_curvature import fisher
from lightning_curvature._checks import check_count, check_option, check_share, listing
from lightning_curvature.accumulate import Accumulator, owners_of
from lightning_curvature.compiled import check_graphed, is_compiled
from lightning_curvature.factors import KroneckerFactors
from lightning_curvature.fingerprints import fingerprint
from lightning_curvature.fisher import FISHER_KINDS
from lightning_curvature.layers import is_conv1d, matrix_shape
from lightning_curvature.losses import SoftmaxLoss
from lightning_curvature.plan import place_sums
from lightning_curvature.positions import batch_mask, check_positions
from lightning_curvature.ranks import Ranks
from lightning_curvature.rows import BatchGradients
from lightning_curvature.selection import LayerChoice, choose_layers
from lightning_curvature.sums import LayerKind, LayerSums
from lightning_curvature.taps import LayerCall, Taps

ACCUMULATE_ON = ("auto", "model", "cpu")


def check_options(fisher: str, draws: int, positions: str, accumulate_on: str, share: float) -> None:
    """Raise ``ValueError`` if an argument of :class:`Collector` that needs no network is none of its options."""
    check_share(share, "share")
    check_option(fisher, FISHER_KINDS, "fisher")
    check_count(draws, "draws")
    check_positions(positions)
    check_option(accumulate_on, ACCUMULATE_ON, "accumulate_on")


class Collector:
    """Collects K-FAC factors from the steps of a model.

    Args:
        module: The network; layer names are relative to it.
        layers: Presets or name patterns, see :mod:`lightning_curvature.selection`.
        fisher: Kind of Fisher, see :mod:`lightning_curvature.fisher`.
        draws: Random vectors (labels) per loss position, for ``"sketched"`` (``"sampled"``).
        positions: Which positions count, see :mod:`lightning_curvature.positions`.
        seed: Seed of the collector's own random generator.
        logits: Name of a submodule or method that returns the logits, for models that hide their cross-entropy.
        accumulate_on: Where the sums live: ``"model"``, on the device of each layer; ``"cpu"``; or ``"auto"``, on the
            device of each layer if they fit there, and otherwise on the CPU.
        share: Share of the positions that is used, in (0, 1], chosen at random in each batch.
        coupled: Also sum the norm-weighted moments that the score ``"coupled"`` needs, see
            :mod:`lightning_curvature.scores`: twice the memory and the products.
        group: ``(i, n)``: cut the chosen layers into n groups and collect the i-th (from 0) alone, where all of them
            together do not fit into memory.
        ranks: The processes of the run; by default this one alone.
        shard: Spread the sums over the processes: each keeps those of its own layers.

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
        accumulate_on: str = "auto",
        share: float = 1.0,
        coupled: bool = False,
        group: tuple[int, int] = (0, 1),
        ranks: Ranks | None = None,
        shard: bool = False,
    ) -> None:
        check_options(fisher, draws, positions, accumulate_on, share)
        self.module = module
        self.fisher = fisher
        self.draws = draws
        self.positions = positions
        self.choice: LayerChoice = choose_layers(module, layers)
        self.chosen: list[str] | None = None
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
        self.kinds = {name: self._kind(module) for name, module in self.choice.modules.items()}
        owners = owners_of(self.kinds, self.ranks) if shard else None
        check_graphed(module)
        self.accumulator = Accumulator(self._new_sums, self._home, positions, self.ranks, owners)
        self._homes: dict[torch.device, torch.device] = {}
        self._taps: Taps | None = None
        self._mask: Tensor | None = None
        self._pending: tuple[SoftmaxLoss, list[LayerCall]] | None = None
        self._taken: BatchGradients | None = None
        self._objective: Tensor | None = None
        self._opened = self._warned = False

    def open(self, batch: Any = None) -> None:
        """Start to record; call before the forward pass.

        Args:
            batch: The batch, needed for ``positions="mask:KEY"`` alone.
        """
        self.abort()
        if self.positions.startswith("mask:"):
            self._mask = batch_mask(batch, self.positions.removeprefix("mask:"))
        if not self._opened and is_compiled(self.module):
            rank_zero_warn(
                "Steps from which curvature is collected run without torch.compile: what was compiled before hooks "
                "were there never calls them. To keep training compiled, collect in validation (loop='validation')."
            )
        self._opened = True
        names = self.choice.modules if self.chosen is None else self.chosen
        self._taps = Taps(
            self.module,
            {name: self.choice.modules[name] for name in names},
            logits=self.logits,
            watch_gradients=self.fisher == "empirical",
            on_backward=self.before_backward,
        )
        self._taps.__enter__()

    def before_backward(self, objective: Tensor | None) -> None:
        """Take the gradients of this batch; call when the forward pass is done and its graph is alive.

        Only the first call after :meth:`open` counts; for ``empirical``, a second one whose gradients would mix with
        the first's is an error.

        Args:
            objective: The scalar that the training is about to backpropagate; None if the step has none, and computes
                one cross-entropy.

        Raises:
            RuntimeError: If the logits cannot be told, a chosen layer did not run or has no graph, the factors do not
                fit into memory, or ``exact`` is too expensive.
        """
        taps = self._taps
        if taps is None:
            return
        if not taps.recording:
            if self._pending is not None and objective is not None and objective is not self._objective:
                fisher.check_unreached(self._pending[1], objective)
            return
        taps.recording = False  # recomputed forward passes (activation checkpointing) are not counted twice
        loss = fisher.find_loss(taps, objective)
        if self.chosen is None:
            fisher.check_reentrant(loss, taps)
            heads = fisher.output_heads(loss, taps.calls)
            fired = [call.name for call in taps.calls]
            self.chosen = self._plan(self.choice.resolve(fired, heads))
            if late := sorted(set(self.chosen) - set(fired)):
                rank_zero_warn(
                    f"Chosen layers {listing(late)} did not run in the first collected batch. They are collected from "
                    "whenever they run; if they never do, that is an error in the end."
                )
        calls = [call for call in taps.calls if call.name in self.chosen]
        dead = sorted({call.name for call in calls if call.edge is None})
        if dead:
            raise RuntimeError(
                f"Outputs of layers {listing(dead)} need no gradient: everything up to them is frozen (or runs under "
                "no_grad, or reentrant checkpointing). Unfreeze something below them, or leave them out of layers=."
            )
        if not calls:
            return  # none of the layers that run in some batches only ran in this one
        if self.fisher == "empirical":
            if objective is None and loss.output is not None:
                objective = loss.output.sum()
            fisher.check_single_path(loss, calls, objective)
            # Of the loss, what arrives is still to come; its logits are not needed any more.
            loss = dataclasses.replace(loss, logits=loss.logits.new_empty(0))
            self._pending, self._objective = (loss, calls), objective
            taps.losses = []
            return
        with taps.own_pass():
            passes = fisher.count_passes(self.fisher, loss, calls, self.draws)
            if passes > fisher.EXACT_LIMIT:
                raise RuntimeError(
                    f"fisher='exact' needs {passes} backward passes for this batch, the limit is {fisher.EXACT_LIMIT}. "
                    "Use fisher='sketched', whose expectation is the same, with as many draws as you can afford."
                )
            if self.fisher == "exact" and self.accumulator.num_seen == 0:
                rank_zero_info(f"fisher='exact' takes {passes} backward passes per batch.")
            random = torch.Generator(loss.logits.device).manual_seed(self._seed)
            gradients = list(fisher.gradient_passes(self.fisher, loss, calls, self.draws, random))
        # Only a finished batch is added: one that is interrupted is repeated when the run goes on. The graph, which an
        # edge keeps, must not outlive its batch.
        calls = [dataclasses.replace(call, edge=None) for call in calls]
        self._taken = BatchGradients(calls, gradients, 1.0 if self.fisher == "exact" else 1.0 / passes)
        taps.calls, taps.losses = [], []

    def stop(self) -> None:
        """Stop to listen, where the rest of the step (the optimizer's) is known to hold nothing of interest."""
        if self._taps is not None:
            self._taps.close()

    def backward(self, objective: Tensor | None) -> None:
        """Take the gradients where no training backward follows: weights and ``.grad`` are left alone."""
        self.before_backward(objective)
        if self._pending is not None and self._objective is not None and self._taps is not None:
            edges = [call.edge for call in self._pending[1] if call.edge is not None]
            with torch.autocast(self._objective.device.type, enabled=False), self._taps.own_pass():
                # The tensor hooks keep what passes; another collector may need the graph, too.
                torch.autograd.grad(self._objective, edges, retain_graph=True, allow_unused=True)

    def close(self) -> None:
        """Finish the batch; call after the backward pass. A collective where the sums are sharded."""
        if self._pending is not None:
            loss, calls = self._pending
            if all(call.gradient is None for call in calls):
                self.abort()
                raise RuntimeError(
                    "The training's backward sent no gradient to the chosen layers; use another fisher=."
                )
            gradients = [call.gradient for call in calls]
            self._taken = BatchGradients(calls, [gradients], fisher.empirical_unit(loss).square())
        elif self._taken is None and self._taps is not None and self._taps.recording and self._taps.losses:
            self._warn_of_unseen_backward()
        if self._taken is not None:
            self._taken.mask, self._taken.share, self._taken.seed = self._mask, self.share, self._seed
        try:
            self.stop()  # nothing looks at the functions that add the batch
            self.accumulator.add(self._taken, self.kinds)
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop whatever is recorded of the current batch, and every hook."""
        self._pending = self._taken = self._objective = self._mask = None
        if self._taps is not None:
            self._taps.close()
            self._taps = None

    @property
    def sums(self) -> Mapping[str, LayerSums]:
        """The running sums that this process keeps, by layer."""
        return self.accumulator.sums

    @property
    def is_open(self) -> bool:
        """Whether a batch is being collected."""
        return self._taps is not None

    @property
    def holds_batch(self) -> bool:
        """Whether the gradients of a batch were taken, and not added yet."""
        return self._taken is not None or self._pending is not None

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

    def _warn_of_unseen_backward(self) -> None:
        if not self._warned:
            rank_zero_warn(
                "A training step computed a cross-entropy, and no backward pass of it was seen, so nothing was "
                "collected from it. In manual optimization call self.manual_backward(loss) or loss.backward(); "
                "torch.autograd.backward and torch.autograd.grad are not seen."
            )
        self._warned = True

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
