"""What the backward passes of one step send to the chosen layers.

A step may run several backward passes (truncated backpropagation through time, several networks in manual optimization,
a head that is backpropagated chunk by chunk). Each one that goes through a softmax loss to chosen layers counts; the
others are passed over, with the reason.
"""

import dataclasses
import weakref
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lightning_curvature.recording import detached, empirical, fisher, objectives
from lightning_curvature.recording.calls import BatchGradients, LayerCall
from lightning_curvature.recording.detached import DetachedCopy
from lightning_curvature.recording.graph import node_of, origin_of, reached
from lightning_curvature.recording.losses import OutputLoss, count_by_layer
from lightning_curvature.recording.network import WatchedNetwork
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.recording.parts import parts_of
from lightning_curvature.recording.taps import Taps

_GOLDEN = 0x9E3779B1  # spreads the seeds of the backward passes of one step


class StepGradients:
    """The gradients of one step, from the moment at which its forward pass begins.

    Args:
        taps: The open recorder.
        network: The network.
        options: Which gradients are taken.
        seed: Seed of the random draws.
        mask: Mask of the batch, or None.

    Attributes:
        passed_over: For each backward pass that was not used, why.
        frozen: Chosen layers that ran and whose outputs need no gradient.
        failed: Whether an error was met: nothing more is taken.
    """

    def __init__(
        self, taps: Taps, network: WatchedNetwork, options: CollectorOptions, seed: int, mask: Tensor | None
    ) -> None:
        self.taps = taps
        self.passed_over: list[str] = []
        self.frozen: set[str] = set()
        self.failed = False
        self._network = network
        self._options = options
        self._parameters = network.parameters()
        self._seed = seed
        self._mask = mask
        self._objectives: list[weakref.ref[Tensor]] = []
        self._calls: list[LayerCall] = []
        self._received: dict[LayerCall, list[Tensor]] = {}  # gradients of the Fisher's own passes
        self._losses: dict[LayerCall, list[OutputLoss]] = {}  # whose gradients were, or will be, sent to a call
        self._copies: list[DetachedCopy] = []
        self._heads: set[str] = set()
        self._head: tuple[Node, list[int]] | None = None
        self._num_drawn = 0
        self._has_chosen = False
        self._of_softmax: bool | None = None  # whether what was taken is of a softmax loss

    @property
    def is_empty(self) -> bool:
        """Whether no gradient was taken, nor is on its way."""
        return not self._losses

    @property
    def edges(self) -> list[GradientEdge]:
        """Where the calls to which the training will send gradients are in the graph."""
        return [call.edge for call in self._losses if call.edge is not None] if self._options.is_empirical else []

    def take(self, objective: Tensor | None) -> None:
        """Take the gradients of one backward pass while its graph is alive.

        Args:
            objective: What is backpropagated; None if the step backpropagates nothing, and computes one cross-entropy.

        Raises:
            RuntimeError: If it cannot be told which loss counts, or gradients cannot be taken.
        """
        if self.failed or self.taps.closed:
            return
        if objective is not None:
            if any(reference() is objective for reference in self._objectives):
                return  # Lightning's hook and the tensor's own method tell of the same pass
            self._objectives.append(weakref.ref(objective))
        self._calls += self.taps.calls
        self.taps.calls = []
        losses = objectives.losses_that_reach(self.taps, objective)
        self.taps.losses = [loss for loss in self.taps.losses if loss not in losses]
        if losses:
            losses = parts_of(objectives.of_the_output(losses), self.taps, self._options, self._parameters, objective)
            self._take_through(losses, objective)
        elif objective is None or not self._hand_on(objective):
            if self._options.is_empirical and objective is not None:
                empirical.check_unreached({edge.node for edge in self.edges}, objective)
            self.passed_over.append(objectives.why_no_loss(self.taps, self._options.logits))

    def _take_through(self, losses: list[OutputLoss], objective: Tensor | None) -> None:
        """Take the gradients that go through some losses."""
        network, is_softmax = self._network, losses[0].kind == "softmax"
        if self._of_softmax is not None and self._of_softmax != is_softmax:
            self.passed_over.append("A binary or squared loss beside a softmax loss of the same step does not count.")
            if not is_softmax:
                return
            self._forget_taken()
        leaves: list[Tensor] = []
        if network.detaches is not False:
            leaves = detached.detached_leaves(losses, self._parameters)
            network.detaches = bool(leaves)
        calls = self._reached_calls(losses, objective, leaves)
        if network.chosen is None and not self._choose_below(losses, calls, bool(leaves)):
            return
        chosen = network.chosen or []
        self.frozen |= {call.name for call in self._calls if call.edge is None and call.name in chosen}
        calls = [call for call in calls if call.name in chosen]
        if not calls and not leaves:
            self._pass_over(chosen)
            return
        self._of_softmax = is_softmax
        self._check_head(losses[0])
        if self._options.is_empirical:
            self._expect(losses, calls, leaves, objective)
        else:
            self._backpropagate(losses, calls, leaves)

    def _forget_taken(self) -> None:
        """Forget what a pass gave that does not count, and the layers that were chosen by it."""
        self._received, self._losses, self._copies, self._head = {}, {}, [], None
        if self._has_chosen:
            self._network.chosen, self._has_chosen = None, False

    def _choose_below(self, losses: Sequence[OutputLoss], calls: Sequence[LayerCall], has_leaves: bool) -> bool:
        """Choose layers in the first batch; tell whether gradients can be taken now.

        Args:
            losses: The losses of the backward pass.
            calls: Calls that they reach.
            has_leaves: Whether detached activations lie below the losses; layers below those are chosen when the
                gradient is handed on.
        """
        objectives.check_reentrant(losses, self.taps, {call.name for call in self._calls})
        self._heads |= objectives.output_heads(losses, self._calls)
        only_heads = all(call.name in self._heads for call in calls)
        return (only_heads and has_leaves) or self._choose(calls)

    def _live_calls(self) -> dict[Node, LayerCall]:
        """Return the calls whose output has a place in the graph, by that place."""
        return {call.edge.node: call for call in self._calls if call.edge is not None}

    def _reached_calls(
        self, losses: Sequence[OutputLoss], objective: Tensor | None, leaves: Sequence[Tensor]
    ) -> list[LayerCall]:
        """Return the calls with a graph that the losses reach; where that is not asked for, all that may be."""
        live = [call for call in self._calls if call.edge is not None]
        is_only_pass = objective is None or (len(self._objectives) == 1 and not self.taps.losses)
        if self._network.chosen is not None and is_only_pass and not leaves:
            return live
        goals = set(self._live_calls())
        nodes = set[Node]().union(*(reached(node_of(loss.logits), goals) for loss in losses))
        return [call for call in live if call.edge is not None and call.edge.node in nodes]

    def _choose(self, calls: Sequence[LayerCall]) -> bool:
        """Choose layers among those that were called; tell whether there are any."""
        fired = list(dict.fromkeys(call.name for call in calls))
        live = {call.name for call in self._calls if call.edge is not None}
        dead = ({call.name for call in self._calls} | self.taps.without_graph) - live
        try:
            self._network.choose(fired, self._heads, dead)
            self._has_chosen = True
        except objectives.NothingToCollectError as error:
            if self.taps.transformed:
                self._pass_over(sorted(self.taps.transformed))
            else:
                self.passed_over.append(str(error))
            return False
        return True

    def _pass_over(self, chosen: Collection[str]) -> None:
        """Say why a backward pass through a softmax loss gives no gradients."""
        reason = objectives.why_no_gradients(chosen, self._calls, self.taps.transformed)
        if reason is not None:
            self.passed_over.append(reason)

    def _check_head(self, loss: OutputLoss) -> None:
        """Raise if another backward pass of this step went through another output of the model."""
        if self._options.logits is not None:
            return
        node, shape = node_of(loss.logits), list(loss.logits.shape)
        if self._head is None:
            self._head = node, shape
            return
        first, second = (origin_of(head, self._parameters) for head in (self._head[0], node))
        if not (first.is_head_of(second) or first.looks_like(second)):
            raise RuntimeError(objectives.several_outputs_message([self._head[1], shape]))

    def _expect(
        self,
        losses: Sequence[OutputLoss],
        calls: Sequence[LayerCall],
        leaves: Sequence[Tensor],
        objective: Tensor | None,
    ) -> None:
        """Note that the training's own backward pass sends gradients of some losses to some calls."""
        chosen = self._network.chosen or []
        goals = {node for node, call in self._live_calls().items() if call.name in chosen} | set(map(node_of, leaves))
        # The gradients that arrive at losses whose logits are named are not watched.
        empirical.check_single_path(losses, goals, None if self._options.logits is not None else objective)
        # Of a loss, what arrives is still to come; its logits are not needed any more.
        kept = [dataclasses.replace(loss, logits=loss.logits.new_empty(0)) for loss in losses]
        for call in calls:
            self._losses.setdefault(call, []).extend(kept)
        self._copies += [DetachedCopy(leaf, [], kept) for leaf in leaves]

    def _backpropagate(
        self, losses: Sequence[OutputLoss], calls: Sequence[LayerCall], leaves: Sequence[Tensor]
    ) -> None:
        """Run the backward passes of the Fisher, and keep what arrives at calls and leaves."""
        kind, draws = self._options.fisher, self._options.draws
        targets = [*calls, *map(detached.as_call, leaves)]
        with self.taps.own_pass(), self._network.undisturbed():
            groups = []
            if kind == "exact":
                groups = [fisher.alone(z) if leaves else fisher.independent_groups(z, targets) for z in losses]
            self._network.before_passes(fisher.count_passes(kind, losses, groups, draws), kind == "exact")
            seed = (self._seed + _GOLDEN * self._num_drawn) % 2**32
            self._num_drawn += 1
            random = torch.Generator(losses[0].logits.device).manual_seed(seed)
            passes = list(fisher.gradient_passes(kind, losses, targets, draws, random, groups))
        kept = [loss.without_graph() for loss in losses]
        for index, call in enumerate(calls):
            arrived = [gradient for sent in passes if (gradient := sent[index]) is not None]
            if arrived or not passes:  # the logits depend on this call, or there are no positions
                self._received.setdefault(call, []).extend(arrived)
                self._losses.setdefault(call, []).extend(kept)
        for index, leaf in enumerate(leaves, len(calls)):
            at_leaf = [torch.zeros_like(leaf) if (sent := received[index]) is None else sent for received in passes]
            self._copies.append(DetachedCopy(leaf, at_leaf, kept))

    def _hand_on(self, activation: Tensor) -> bool:
        """Hand on what detached copies of an activation received; tell whether there are such copies."""
        copies = [copy for copy in self._copies if copy.is_part_of(activation)]
        if not copies:
            return False
        live = self._live_calls()
        nodes = reached(activation.grad_fn, set(live))
        calls = [call for call in self._calls if call.edge is not None and call.edge.node in nodes]
        if self._network.chosen is None and not self._choose(calls):
            return True
        chosen = self._network.chosen or []
        calls = [call for call in calls if call.name in chosen]
        self._copies = [copy for copy in self._copies if copy not in copies]
        if not calls:
            self._pass_over(chosen)
            return True
        if not self._options.is_empirical:
            with self.taps.own_pass(), self._network.undisturbed():
                sent = detached.hand_on(activation, copies, calls, together=self._options.fisher != "exact")
            for call, gradient in sent:
                self._received.setdefault(call, []).append(gradient)
            calls = [call for call in calls if call in self._received]
        for call in calls:
            self._losses.setdefault(call, []).extend(dict.fromkeys(loss for copy in copies for loss in copy.losses))
        return True

    def finish(self) -> BatchGradients | None:
        """Return what the step adds to the factors; None if there is nothing.

        Raises:
            RuntimeError: If the training sent no gradient to any chosen layer, or weighs its loss positions
                differently.
        """
        if self.failed or self.is_empty:
            if self._copies and not self.passed_over:
                self.passed_over.append(
                    "The logits depend on the layers through a detached activation alone, whose gradient was not "
                    "handed on with activation.backward(gradient). Backpropagate it so, or take detach() away."
                )
            return None
        calls = [call for call in self._calls if call in self._losses]
        losses = [self._losses[call] for call in calls]
        scales: list[float | Tensor]
        if self._options.is_empirical:
            gradients = [[] if call.gradient is None else [call.gradient] for call in calls]
            scales = empirical.scales_of(losses, gradients)
        else:
            gradients = [self._received[call] for call in calls]
            scales = [1.0 if self._options.fisher == "exact" else 1.0 / self._options.draws] * len(calls)
        # Only a finished batch is added, and the graph, which an edge keeps, must not outlive it.
        calls = [dataclasses.replace(call, edge=None, arrived=[]) for call in calls]
        self._calls, self._received, self._losses, self._copies = [], {}, {}, []
        counts = count_by_layer((call.name, behind) for call, behind in zip(calls, losses, strict=True))
        return BatchGradients(calls, gradients, scales, self._mask, self._options.share, self._seed, counts)
