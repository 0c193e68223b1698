"""One step of a model that is collected from: from the forward pass to what it adds to the factors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_curvature.recording.calls import BatchGradients
from lightning_curvature.recording.gradients import StepGradients
from lightning_curvature.recording.network import WatchedNetwork
from lightning_curvature.recording.objectives import NothingToCollectError
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.recording.positions import batch_mask
from lightning_curvature.recording.taps import Taps


class Step:
    """The recording of one step: a context manager around its forward and backward passes.

    When the block ends, what the step gives is delivered; an exception drops it. All hooks are removed then. A training
    loop, whose step begins and ends in different hooks, calls :meth:`open`, :meth:`close` and :meth:`abort`.

    Args:
        network: The network.
        options: What is collected.
        batch: The batch, needed for ``positions="mask:KEY"`` alone.
        seed: Seed of the step's random draws.
        deliver: Takes what the step gives, None if that is nothing. A collective where sums are spread.
        on_error: Takes an error that is met, in place of raising it inside the code that is watched.
    """

    def __init__(
        self,
        network: WatchedNetwork,
        options: CollectorOptions,
        batch: Any,
        seed: int,
        deliver: Callable[[BatchGradients | None], None],
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._network = network
        self._options = options
        self._batch = batch
        self._seed = seed
        self._deliver = deliver
        self._on_error = on_error
        self._gradients: StepGradients | None = None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def open(self) -> None:
        """Start to record; call before the forward pass.

        Raises:
            RuntimeError: If the batch lacks the mask that tells which positions count.
        """
        with self._guarded():
            rule, options = self._options.positions, self._options
            mask = batch_mask(self._batch, rule.removeprefix("mask:")) if rule.startswith("mask:") else None
            self._network.before_recording()
            taps = Taps(
                self._network.module,
                self._network.watched,
                logits=options.logits,
                watch_gradients=options.is_empirical,
                on_backward=self.before_backward,
                on_error=None if self._on_error is None else self._fail,
                unchecked=self._network.unchecked,
            )
            self._gradients = StepGradients(taps, self._network, options, self._seed, mask)
            taps.open()

    def before_backward(self, objective: Tensor | None) -> None:
        """Take the gradients of a backward pass; call when the forward pass is done and its graph is alive.

        A pass that goes through no softmax loss, or reaches no chosen layer, is passed over.

        Args:
            objective: What the training is about to backpropagate; None if the step backpropagates nothing, and
                computes one cross-entropy.

        Raises:
            RuntimeError: If the logits cannot be told, the factors do not fit into memory, or ``exact`` is too
                expensive.
        """
        if self._gradients is not None:
            self._gradients.take(objective)

    def backward(self, objective: Tensor | None) -> None:
        """Take the gradients where no training backward follows: weights and ``.grad`` are left alone.

        Args:
            objective: The loss; None if the step returned none, and computed one cross-entropy.

        Raises:
            RuntimeError: As :meth:`before_backward`.
        """
        gradients = self._gradients
        if gradients is None:
            return
        with self._guarded():
            if self._options.is_empirical and objective is None and len(gradients.taps.losses) == 1:
                (loss,) = gradients.taps.losses
                objective = None if loss.output is None else loss.output.sum()
            gradients.take(objective)
            if gradients.edges and objective is not None:
                with torch.autocast(objective.device.type, enabled=False), gradients.taps.own_pass():
                    # The tensor hooks keep what passes; another collector may need the graph, too.
                    torch.autograd.grad(objective, gradients.edges, retain_graph=True, allow_unused=True)

    def stop_recording(self) -> None:
        """Record nothing more: the rest of the step (the optimizer's) is known to hold nothing of interest."""
        if self._gradients is not None:
            self._gradients.taps.close()

    def close(self) -> None:
        """Deliver what the step gives; call after the backward pass. A collective where the sums are spread.

        Raises:
            NothingToCollectError: If backward passes ran, and nothing could be collected from any.
            RuntimeError: If the training sent no gradient to the chosen layers.
        """
        try:
            batch, failure = self._finish()
            with self._guarded():
                self._deliver(batch)
        finally:
            self.abort()
        if failure is not None:
            with self._guarded():
                raise failure

    def _finish(self) -> tuple[BatchGradients | None, RuntimeError | None]:
        """Return what the step gives, and why that is nothing; its graph is let go, before the batch is added."""
        gradients, batch, failure = self._gradients, None, None
        if gradients is None:
            return None, None
        try:
            batch = gradients.finish()
            if batch is None:
                failure = _why_nothing(gradients)
        except RuntimeError as error:
            failure = error
        self._network.note(gradients.frozen, [] if batch is None else gradients.passed_over)
        gradients.taps.close()
        self._gradients = None
        return batch, failure

    def abort(self) -> None:
        """Drop whatever is recorded, and every hook."""
        if self._gradients is not None:
            self._gradients.taps.close()
            self._gradients = None

    @property
    def is_open(self) -> bool:
        """Whether the step is being recorded."""
        return self._gradients is not None

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients of a backward pass were taken, and not delivered yet."""
        return self._gradients is not None and not self._gradients.is_empty

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Hand an error of a ``with`` block to ``on_error``, if there is one; the step gives nothing then."""
        try:
            yield
        except Exception as error:
            if self._on_error is None:
                raise
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Take nothing more from the step, and hand on the error that was met in it."""
        if self._gradients is not None:
            self._gradients.failed = True
        if self._on_error is not None:
            self._on_error(error)


def _why_nothing(gradients: StepGradients) -> RuntimeError | None:
    """Return the error of a step that gave nothing; None if it ran no backward pass that was seen."""
    if gradients.failed:
        return None
    if gradients.passed_over:
        return NothingToCollectError(gradients.passed_over[0])
    if gradients.taps.losses:
        return NothingToCollectError(
            "A training step computed a cross-entropy, and no backward pass of it was seen, so nothing was "
            "collected from it. In manual optimization call self.manual_backward(loss) or loss.backward(); "
            "torch.autograd.backward and torch.autograd.grad are not seen."
        )
    return None
