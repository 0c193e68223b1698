"""The network whose steps are recorded: which of its layers are watched, and what its first batch has shown of them."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_curvature._checks import listing
from lightning_curvature.layers.choice import LayerChoice
from lightning_curvature.recording import fisher
from lightning_curvature.recording.compiled import is_compiled
from lightning_curvature.recording.objectives import NothingToCollectError, frozen_layers_message


class WatchedNetwork:
    """A network, and what is known of it over all of its steps.

    Args:
        module: The network.
        choice: The layers that may be chosen.
        keep_fitting: Called once with the chosen layers. It returns those to collect, and raises if their factors do
            not fit into memory.

    Attributes:
        chosen: Names of the layers to collect; None before the first batch has shown them.
        frozen: Layers that ran and whose outputs needed no gradient.
        left_out: How many backward passes were not used in steps that otherwise were, by the reason.
        detaches: Whether the network detaches activations between logits and layers; None before the first batch.
        unchecked: Layers of which no forward pass was compared with a product yet.
    """

    def __init__(self, module: nn.Module, choice: LayerChoice, keep_fitting: Callable[[list[str]], list[str]]) -> None:
        self.module = module
        self.choice = choice
        self.chosen: list[str] | None = None
        self.frozen: set[str] = set()
        self.left_out: dict[str, int] = {}
        self.detaches: bool | None = None
        self.unchecked = set(choice.modules)
        self._keep_fitting = keep_fitting
        self._was_recorded = self._told_passes = False
        self._disturbed: bool | None = None

    @property
    def watched(self) -> Mapping[str, nn.Module]:
        """The chosen layers by name; before the first batch, all that may be chosen."""
        names = self.choice.modules if self.chosen is None else self.chosen
        return {name: self.choice.modules[name] for name in names}

    def weights(self) -> dict[str, Tensor]:
        """Return the weights of the watched layers as they are now."""
        return {name: layer.get_parameter("weight") for name, layer in self.watched.items()}

    def parameters(self) -> frozenset[int]:
        """Return the addresses (``id``) of the parameters, which the network keeps alive."""
        return frozenset(map(id, self.module.parameters()))

    def choose(self, fired: Sequence[str], heads: Collection[str], dead: Collection[str]) -> None:
        """Choose layers, given those that ran in the first batch.

        Args:
            fired: Layers that a softmax loss reaches, in the order in which they ran.
            heads: Output heads.
            dead: Layers that ran and whose outputs need no gradient.

        Raises:
            NothingToCollectError: If none of those that are meant ran in this batch.
            DoesNotFitError: If their factors do not fit into memory.
        """
        try:
            chosen = self.choice.resolve(fired, heads, dead)
        except RuntimeError as error:
            self.frozen |= set(dead)
            raise NothingToCollectError(frozen_layers_message(dead) if dead else str(error)) from error
        self.chosen = self._keep_fitting(chosen)
        late = set(self.chosen) - set(fired)
        for names, lack in ((late - set(dead), "did not run"), (late & set(dead), "ran without gradients (frozen?)")):
            if names and late != set(self.chosen):  # where nothing is left, the step itself says so
                rank_zero_warn(
                    f"Chosen layers {listing(sorted(names))} {lack} in the first collected batch. They are collected "
                    "from whenever they run with gradients; if they never do, they are not edited."
                )

    def before_recording(self) -> None:
        """Warn, before the first step, if compiled code will run uncompiled."""
        if not self._was_recorded and is_compiled(self.module):
            rank_zero_warn(
                "Steps from which curvature is collected run without torch.compile: what was compiled before hooks "
                "were there never calls them. To keep training compiled, collect in validation (loop='validation')."
            )
        self._was_recorded = True

    def before_passes(self, count: int, is_exact: bool) -> None:
        """Raise ``RuntimeError`` if a batch needs too many backward passes; say once what ``exact`` costs."""
        if count > fisher.EXACT_LIMIT:
            raise RuntimeError(
                f"fisher='exact' needs {count} backward passes for this batch, the limit is {fisher.EXACT_LIMIT}. "
                "Use fisher='sketched', whose expectation is the same, with as many draws as you can afford."
            )
        if is_exact and not self._told_passes:
            rank_zero_info(f"fisher='exact' takes {count} backward passes per batch.")
        self._told_passes = True

    def note(self, frozen: Collection[str], passed_over: Collection[str]) -> None:
        """Keep what a step that ends has shown beside its gradients.

        Args:
            frozen: Chosen layers that ran and whose outputs needed no gradient.
            passed_over: Why backward passes were not used, beside others of the step that were.
        """
        self.frozen |= set(frozen)
        for reason in passed_over:
            if reason not in self.left_out:
                rank_zero_info(f"A backward pass of a collected step was left out: {reason}")
            self.left_out[reason] = self.left_out.get(reason, 0) + 1

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Run backward passes that leave buffers and ``.grad`` as they were.

        Activation checkpointing calls modules again in a backward pass, and custom functions may write into ``.grad``
        there. The first batch shows whether this network does so; if it does not, nothing is copied afterwards.
        """
        if self._disturbed is False:
            yield
            return
        buffers = [
            (module, name, buffer, buffer.detach().clone())
            for module in self.module.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and _can_be_copied(buffer)
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


def _can_be_copied(buffer: Tensor) -> bool:
    return buffer.layout is torch.strided and not (buffer.is_inference() or buffer.is_meta)
