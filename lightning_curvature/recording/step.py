"""One step of a model: what its forward pass recorded, and what its backward passes send to the chosen layers.

A step may run several backward passes (truncated backpropagation through time, several networks in manual optimization,
a head that is backpropagated chunk by chunk). Each one that goes through a softmax loss to chosen layers counts; the
others are passed over, and the step says why.
"""

import dataclasses
import weakref
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from lightning_curvature._checks import listing
from lightning_curvature.distributed import whole
from lightning_curvature.recording import fisher, objectives
from lightning_curvature.recording.graph import leaves_below, node_of, origin_of, reached
from lightning_curvature.recording.losses import SoftmaxLoss, every_position
from lightning_curvature.recording.rows import BatchGradients
from lightning_curvature.recording.taps import LayerCall, Taps

_GOLDEN = 0x9E3779B1  # spreads the seeds of the backward passes of one step


@dataclass(frozen=True)
class FisherOptions:
    """Which gradients are taken.

    Args:
        kind: Kind of Fisher, see :mod:`lightning_curvature.recording.fisher`.
        draws: Random vectors (labels) per loss position.
        logits: Name of what returns the logits, or None.
        class_dim: Dimension of the classes of these logits, or None.
    """

    kind: str
    draws: int
    logits: str | None = None
    class_dim: int | None = None


class Layers(Protocol):
    """Which layers are collected.

    Attributes:
        chosen: Their names; None before the first batch has shown them.
        detaches: Whether the model detaches activations between logits and layers; None before the first batch.
    """

    chosen: list[str] | None
    detaches: bool | None

    def choose(self, fired: Sequence[str], heads: Collection[str], dead: Collection[str]) -> None:
        """Set ``chosen``.

        Args:
            fired: Layers that a softmax loss reaches, in the order in which they ran.
            heads: Output heads.
            dead: Layers that ran and whose outputs need no gradient.

        Raises:
            NothingToCollectError: If none of the layers that are meant is among ``fired``.
        """

    def before_passes(self, count: int) -> None:
        """Raise if so many backward passes for one batch are too many."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """Return a context after which buffers and ``.grad`` are what they were."""


@dataclass(eq=False)
class _Detached:
    """A detached copy of an activation below the logits, whose gradient the step hands on by itself.

    Args:
        leaf: The copy; its memory is that of the activation.
        gradients: What each backward pass for the Fisher sent to it.
        losses: The losses above it.
    """

    leaf: Tensor
    gradients: list[Tensor]
    losses: list[SoftmaxLoss]


@dataclass(eq=False)
class _Received:
    """What one call of a layer received.

    Args:
        gradients: Gradients at its output.
        losses: For ``empirical``, the losses whose gradients the training sends there.
    """

    gradients: list[Tensor] = field(default_factory=list)
    losses: list[SoftmaxLoss] = field(default_factory=list)


class Step:
    """One step, from the moment at which its forward pass begins.

    Args:
        taps: The open recorder.
        layers: Which layers are collected.
        options: Which gradients are taken.
        parameters: Addresses (``id``) of the network's parameters.
        seed: Seed of the random draws.
        mask: Mask of the batch, or None.

    Attributes:
        passed_over: For each backward pass that was not used, why.
        frozen: Chosen layers that ran and whose outputs need no gradient.
        failed: Whether an error was met: nothing more is taken.
    """

    def __init__(
        self,
        taps: Taps,
        layers: Layers,
        options: FisherOptions,
        parameters: Collection[int],
        seed: int,
        mask: Tensor | None,
    ) -> None:
        self.taps = taps
        self.passed_over: list[str] = []
        self.frozen: set[str] = set()
        self.failed = False
        self._layers = layers
        self._options = options
        self._parameters = parameters
        self._seed = seed
        self._mask = mask
        self._told: list[weakref.ref[Tensor]] = []
        self._calls: list[LayerCall] = []
        self._received: dict[LayerCall, _Received] = {}
        self._detached: list[_Detached] = []
        self._heads: set[str] = set()
        self._head: tuple[Node, list[int]] | None = None
        self._num_used = self._num_drawn = 0

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients of a backward pass were taken, or are on their way."""
        return bool(self._received)

    @property
    def edges(self) -> list[torch.autograd.graph.GradientEdge]:
        """Where the calls that will receive gradients are in the graph."""
        return [call.edge for call in self._received if call.edge is not None]

    def before_backward(self, objective: Tensor | None) -> None:
        """Take the gradients of one backward pass while its graph is alive.

        Args:
            objective: What is backpropagated; None if the step backpropagates nothing, and computes one cross-entropy.

        Raises:
            RuntimeError: If it cannot be told which loss counts, or gradients cannot be taken.
        """
        if self.failed or self.taps.closed:
            return
        if objective is not None:
            if any(reference() is objective for reference in self._told):
                return  # Lightning's hook and the tensor's own method tell of the same pass
            self._told.append(weakref.ref(objective))
        self._calls += self.taps.calls
        self.taps.calls = []
        losses = objectives.losses_that_reach(self.taps, objective)
        self.taps.losses = [loss for loss in self.taps.losses if loss not in losses]
        if losses:
            self._take(self._parts(losses, objective), objective)
        elif objective is None or not self._hand_on(objective):
            if self._options.kind == "empirical" and objective is not None:
                objectives.check_unreached({edge.node for edge in self.edges}, objective)
            self.passed_over.append(objectives.why_no_loss(self.taps, self._options.logits))

    def _parts(self, losses: Sequence[SoftmaxLoss], objective: Tensor | None) -> list[SoftmaxLoss]:
        """Return the losses of a backward pass as parts of one loss, having checked that they are."""
        for loss in losses:
            loss.check_logits()
        name = self._options.logits
        if name is not None:
            losses = objectives.seen_below(self.taps, losses, objective) or [
                dataclasses.replace(loss, class_dim=dim, counted=every_position(loss.logits.detach(), dim))
                for loss in losses
                for dim in [objectives.find_class_dim(loss, name, self._options.class_dim, self.taps, objective)]
            ]
        parts = objectives.as_one_loss(losses, self._parameters, named=name is not None)
        if self._options.kind != "empirical":
            parts = [objectives.without_ignored(loss, objective) for loss in parts]
        for loss in parts:
            objectives.check_log_probabilities(loss)
        return parts

    def _take(self, losses: list[SoftmaxLoss], objective: Tensor | None) -> None:
        """Take the gradients that go through some losses."""
        if self._layers.chosen is None:
            objectives.check_reentrant(losses, self.taps, {call.name for call in self._calls})
        leaves = self._detached_leaves(losses)
        calls = self._reached_calls(losses, objective, leaves)
        if self._layers.chosen is None:
            self._heads |= objectives.output_heads(losses, self._calls)
            below = [call.name for call in calls if call.name not in self._heads]
            if (below or not leaves) and not self._choose(calls):
                return
        chosen = self._layers.chosen or []
        self.frozen |= {call.name for call in self._calls if call.edge is None and call.name in chosen}
        calls = [call for call in calls if call.name in chosen]
        if not calls and not leaves:
            self._pass_over(chosen)
            return
        self._check_head(losses[0])
        if self._options.kind == "empirical":
            live = [call.edge.node for call in self._calls if call.edge is not None and call.name in chosen]
            goals = {*live, *map(node_of, leaves)}
            if self._options.logits is not None:
                objective = None  # what arrives at losses that were not looked for is not watched
            objectives.check_single_path(losses, goals, objective)
            self._expect(losses, calls, leaves)
        else:
            self._backpropagate(losses, calls, leaves)
        self._num_used += bool(calls)

    def _detached_leaves(self, losses: Sequence[SoftmaxLoss]) -> list[Tensor]:
        """Return leaves below the logits that are neither parameters nor known not to be there."""
        if self._layers.detaches is False:
            return []
        leaves = {id(leaf): leaf for loss in losses for leaf in leaves_below(loss.logits)}
        kept = [
            leaf
            for key, leaf in leaves.items()
            if key not in self._parameters and not isinstance(leaf, torch.nn.Parameter)
        ]
        self._layers.detaches = bool(kept)
        return kept

    def _reached_calls(
        self, losses: Sequence[SoftmaxLoss], objective: Tensor | None, leaves: Sequence[Tensor]
    ) -> list[LayerCall]:
        """Return the calls with a graph that the losses reach; where that is not asked for, all that may be."""
        live = [call for call in self._calls if call.edge is not None]
        simple = objective is None or (len(self._told) == 1 and not self.taps.losses)
        if self._layers.chosen is not None and simple and not leaves:
            return live
        goals = {call.edge.node for call in live if call.edge is not None}
        met = set[Node]().union(*(reached(node_of(loss.logits), goals) for loss in losses))
        return [call for call in live if call.edge is not None and call.edge.node in met]

    def _choose(self, calls: Sequence[LayerCall]) -> bool:
        """Choose layers among those that were called; tell whether there are any."""
        fired = list(dict.fromkeys(call.name for call in calls))
        live = {call.name for call in self._calls if call.edge is not None}
        dead = ({call.name for call in self._calls} | self.taps.without_graph) - live
        try:
            self._layers.choose(fired, self._heads, dead)
        except objectives.NothingToCollectError as error:
            if self.taps.transformed:
                self._pass_over(sorted(self.taps.transformed))
            else:
                self.passed_over.append(str(error))
            return False
        return True

    def _pass_over(self, chosen: Sequence[str]) -> None:
        """Say why a backward pass through a softmax loss gives no gradients."""
        dead = {call.name for call in self._calls if call.edge is None and call.name in chosen}
        ran = {call.name for call in self._calls}
        if dead:
            self.passed_over.append(objectives.frozen_layers(dead))
        elif self.taps.transformed & set(chosen) and not ran & set(chosen):
            names = listing(sorted(self.taps.transformed & set(chosen)))
            self.passed_over.append(
                f"Layers {names} run inside a torch.func transform (vmap, grad, jvp), whose tensors have no place in "
                "the autograd graph. Collect from a step without it: a plain forward pass and loss.backward(), or over "
                "the trained model (lightning_curvature.collect.collect)."
            )
        elif ran & set(chosen):
            self.passed_over.append(
                f"A softmax loss was backpropagated that does not depend on the chosen layers "
                f"{listing(sorted(chosen))}."
            )

    def _check_head(self, loss: SoftmaxLoss) -> None:
        """Raise if another backward pass of this step went through another output of the model."""
        if self._options.logits is not None:
            return
        node, shape = node_of(loss.logits), list(loss.logits.shape)
        if self._head is None:
            self._head = node, shape
            return
        first, second = (origin_of(head, self._parameters) for head in (self._head[0], node))
        if not (first.is_head_of(second) or first.looks_like(second)):
            raise RuntimeError(objectives.several_outputs([self._head[1], shape]))

    def _expect(self, losses: Sequence[SoftmaxLoss], calls: Sequence[LayerCall], leaves: Sequence[Tensor]) -> None:
        """Note that the training's own backward pass sends gradients of some losses to some calls."""
        # Of a loss, what arrives is still to come; its logits are not needed any more.
        kept = [dataclasses.replace(loss, logits=loss.logits.new_empty(0)) for loss in losses]
        for call in calls:
            self._received.setdefault(call, _Received()).losses.extend(kept)
        self._detached += [_Detached(leaf, [], kept) for leaf in leaves]

    def _backpropagate(
        self, losses: Sequence[SoftmaxLoss], calls: Sequence[LayerCall], leaves: Sequence[Tensor]
    ) -> None:
        """Run the backward passes of the Fisher, and keep what arrives at calls and leaves."""
        targets = [*calls, *map(_as_call, leaves)]
        exact = self._options.kind == "exact"
        with self.taps.own_pass(), self._layers.undisturbed():
            groups = []
            if exact:
                groups = [
                    fisher.independent_groups(loss, targets) if not leaves else fisher.alone(loss) for loss in losses
                ]
            self._layers.before_passes(fisher.count_passes(self._options.kind, losses, groups, self._options.draws))
            seed = (self._seed + _GOLDEN * self._num_drawn) % 2**32
            self._num_drawn += 1
            random = torch.Generator(losses[0].logits.device).manual_seed(seed)
            passes = fisher.gradient_passes(self._options.kind, losses, targets, self._options.draws, random, groups)
            received = list(passes)
        for index, call in enumerate(calls):
            arrived = [gradient for sent in received if (gradient := sent[index]) is not None]
            if arrived or not received:  # the logits depend on this call, or there are no positions
                self._received.setdefault(call, _Received()).gradients.extend(arrived)
        for index, leaf in enumerate(leaves, len(calls)):
            sent_there = [torch.zeros_like(leaf) if (g := sent[index]) is None else g for sent in received]
            self._detached.append(_Detached(leaf, sent_there, []))

    def _hand_on(self, activation: Tensor) -> bool:
        """Hand on what detached copies of an activation received; tell whether there are such copies."""
        copies = [copy for copy in self._detached if _lies_in(copy.leaf, activation)]
        if not copies:
            return False
        goals = {call.edge.node for call in self._calls if call.edge is not None}
        met = reached(activation.grad_fn, goals)
        calls = [call for call in self._calls if call.edge is not None and call.edge.node in met]
        if self._layers.chosen is None and not self._choose(calls):
            return True
        calls = [call for call in calls if call.name in (self._layers.chosen or [])]
        self._detached = [copy for copy in self._detached if copy not in copies]
        if not calls:
            self._pass_over(self._layers.chosen or [])
            return True
        if self._options.kind == "empirical":
            losses = list({id(loss): loss for copy in copies for loss in copy.losses}.values())
            for call in calls:
                self._received.setdefault(call, _Received()).losses.extend(losses)
        else:
            whole_activation = SoftmaxLoss(activation, activation.dim() - 1, activation.new_empty(0))
            with self.taps.own_pass(), self._layers.undisturbed():
                for seed in _placed(copies, activation, together=self._options.kind != "exact"):
                    for call, gradient in zip(calls, fisher.backpropagate(whole_activation, seed, calls), strict=True):
                        if gradient is not None:
                            self._received.setdefault(call, _Received()).gradients.append(gradient)
        self._num_used += 1
        return True

    def finish(self) -> BatchGradients | None:
        """Return what the step adds to the factors; None if there is nothing.

        Raises:
            RuntimeError: If the training sent no gradient to any chosen layer, or weighs its loss positions
                differently.
        """
        if self.failed or not self._received:
            if self._detached and not self.passed_over:
                self.passed_over.append(
                    "The logits depend on the layers through a detached activation alone, whose gradient was not "
                    "handed on with activation.backward(gradient). Backpropagate it so, or take detach() away."
                )
            return None
        calls = [call for call in self._calls if call in self._received]
        scales: list[float | Tensor] = [1.0 if self._options.kind == "exact" else 1.0 / self._options.draws] * len(
            calls
        )
        gradients = [self._received.get(call, _Received()).gradients for call in calls]
        if self._options.kind == "empirical":
            gradients = [[] if call.gradient is None else [call.gradient] for call in calls]
            if not any(gradients):
                raise RuntimeError(
                    "The training's backward sent no gradient to the chosen layers; use another fisher=."
                )
            units: dict[tuple[int, ...], Tensor] = {}
            for index, call in enumerate(calls):
                losses = self._received[call].losses if call in self._received else []
                key = tuple(map(id, losses))  # losses that this step keeps alive
                if losses and key not in units:
                    units[key] = objectives.empirical_unit(losses).square()
                scales[index] = units.get(key, 1.0)
        # Only a finished batch is added, and the graph, which an edge keeps, must not outlive it.
        calls = [dataclasses.replace(call, edge=None, arrived=[]) for call in calls]
        self._calls, self._received, self._detached = [], {}, []
        return BatchGradients(calls, gradients, scales, self._mask)


def _as_call(leaf: Tensor) -> LayerCall:
    """Return a leaf as something that gradients can be sent to."""
    return LayerCall(
        name="",
        module=torch.nn.Identity(),
        inputs=leaf.detach(),
        version=0,
        edge=get_gradient_edge(leaf),
        output_shape=leaf.shape,
        output_dtype=leaf.dtype,
    )


def _lies_in(part: Tensor, activation: Tensor) -> bool:
    """Tell whether a tensor is a view of the memory of another one."""
    if part.untyped_storage().data_ptr() != activation.untyped_storage().data_ptr() or part.dtype != activation.dtype:
        return False
    (start, end), (first, last) = _extent(part), _extent(activation)
    return part.numel() > 0 and first <= start and end <= last


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first and the last place of a tensor in its storage."""
    start = int(tensor.storage_offset())
    return start, start + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def _placed(copies: Sequence[_Detached], activation: Tensor, together: bool) -> list[Tensor]:
    """Return what copies of parts of an activation received, as gradients at the activation.

    Args:
        copies: The copies.
        activation: What they are copies of.
        together: Whether the passes of all copies are the same ones, of which each copy received a part.
    """
    seeds: list[Tensor] = []
    for copy in copies:
        for number, gradient in enumerate(copy.gradients):
            if together and number < len(seeds):
                seed = seeds[number]
            else:
                seed = torch.zeros_like(activation, dtype=gradient.dtype, memory_format=torch.preserve_format)
                seeds.append(seed)
            offset = copy.leaf.storage_offset() - activation.storage_offset()
            place = seed.as_strided(copy.leaf.shape, copy.leaf.stride(), seed.storage_offset() + offset)
            place += whole(gradient)
    return seeds
