"""The hooks of a step: layer inputs, layer output gradients, and the logits of the loss.

All of them live inside :class:`Taps`, a context manager: no hook on a module outlives it, whatever happens inside.
While it is open it records

- each call of a watched layer: the input, and the place of the output in the autograd graph (a gradient edge, taken
  before a later in-place operation can move it, so that ``relu_`` after a layer does not change what is measured);
- each loss whose curvature is known, seen by a :class:`torch.overrides.TorchFunctionMode`.

Nothing that is seen changes. Nothing is recorded in a backward pass, where checkpointing calls layers again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_curvature.distributed import whole
from lightning_curvature.layers.modules import is_under_lora
from lightning_curvature.recording.calls import LayerCall, check_call, is_transformed, version_of
from lightning_curvature.recording.compiled import uncompiled
from lightning_curvature.recording.entry_losses import ENTRY_LOSSES, read_entry_loss
from lightning_curvature.recording.forwards import check_forward, rows_agree
from lightning_curvature.recording.losses import (
    OTHER_LOSSES,
    SOFTMAX_LOSSES,
    OtherLoss,
    OutputLoss,
    every_position,
    read_loss,
)
from lightning_curvature.recording.named_logits import logits_seen

_LOSSES = frozenset([*SOFTMAX_LOSSES, *ENTRY_LOSSES, *OTHER_LOSSES])
_passes: list[object] = []  # tokens of the recorders whose own backward pass is running


class Taps:
    """Context manager that records layer calls and losses of whatever runs inside.

    Args:
        root: The network.
        modules: Layers to watch, by name.
        logits: Name of a submodule or method of ``root`` whose return value is the logits; None to find the loss.
        watch_gradients: Also record the gradients that the training backward sends to the watched outputs.
        on_backward: Called with what is backpropagated just before ``Tensor.backward`` runs.
        on_error: Called with an error that a hook met, in place of raising it inside the code that is watched; nothing
            more is recorded then.
        unchecked: Names of layers whose computation is checked at their next call; they are taken out of the set.

    Attributes:
        calls: Calls of watched layers, in their order.
        losses: Losses whose curvature is known, or the named logits.
        losses_beside_named: With named logits, the losses that were seen beside them.
        other_losses: Losses whose curvature is not known.
        without_gradients: Whether a loss was seen through which no gradient passes.
        transformed: Names of layers that ran inside a ``torch.func`` transform.
        without_graph: Names of layers that ran where nothing is recorded (no gradients, or a backward pass).
        recording: Whether anything is recorded.
        closed: Whether the hooks were removed.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        logits: str | None = None,
        watch_gradients: bool = False,
        on_backward: Callable[[Tensor], None] | None = None,
        on_error: Callable[[Exception], None] | None = None,
        unchecked: set[str] | None = None,
    ) -> None:
        self.calls: list[LayerCall] = []
        self.losses: list[OutputLoss] = []
        self.losses_beside_named: list[OutputLoss] = []
        self.without_gradients = False
        self.without_graph: set[str] = set()
        self.transformed: set[str] = set()
        self.other_losses: list[OtherLoss] = []
        self.recording = True
        self._failed = self.closed = False
        self._root = root
        self._modules = modules
        self._logits = logits
        self._watch_gradients = watch_gradients
        self._on_backward = on_backward
        self._on_error = on_error
        self._unchecked = set[str]() if unchecked is None else unchecked
        self._stack = ExitStack()
        self._token = object()
        # Nothing is trained then: a model that was loaded, or frozen, is validated.
        self._is_frozen = not any(parameter.requires_grad for parameter in root.parameters())

    def open(self) -> None:
        """Put the hooks in their places."""
        with ExitStack() as stack:
            for name, module in self._modules.items():
                hook = _LayerHook(self, name)
                handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            if self._logits is not None:
                stack.enter_context(logits_seen(self._root, self._logits, self.see_named_logits))
            stack.enter_context(uncompiled(self._token))
            stack.enter_context(_FunctionTap(self))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Taps":
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook and forget what was recorded."""
        self.closed = True
        self._stack.close()
        self.calls, self.losses, self.losses_beside_named, self.other_losses = [], [], [], []

    @contextmanager
    def own_pass(self) -> Iterator[None]:
        """Mark the backward passes of a ``with`` block as this recorder's own; other recorders ignore them."""
        _passes.append(self._token)
        try:
            with self.paused():
                yield
        finally:
            _passes.remove(self._token)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing for the time of a ``with`` block."""
        recording, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = recording and not self._failed

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Hand an error of a ``with`` block to ``on_error``, if there is one: the code that is watched goes on.

        The hooks stay and record nothing, since a hook cannot be removed while it runs.
        """
        try:
            yield
        except Exception as error:
            if self._on_error is None:
                raise
            self.recording = False
            self._failed = True
            self._on_error(error)

    def see_call(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Look at one call of a watched layer."""
        if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
            return  # the network is being exported or compiled
        if not (self.recording and torch.is_grad_enabled()):
            self.without_graph.add(name)
            return
        # Without the function mode, which would see each attribute that is read here.
        with torch._C.DisableTorchFunction(), self.guarded():
            self._record(name, module, args[0] if args else next(iter(kwargs.values())), output)

    def _record(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if is_transformed(inputs) or is_transformed(output):
            self.transformed.add(name)
            return
        check_call(name, inputs, output)
        nested, version = inputs.is_nested, version_of(inputs)
        rows = whole(inputs.detach()) if nested else inputs.detach()
        shape = torch.Size([len(rows), output.size(-1)]) if output.is_nested else output.shape
        if not rows_agree(module, rows, shape):
            raise RuntimeError(
                f"Layer {name!r}: it read {list(rows.shape)} and returned {list(shape)}, not as many positions: the "
                f"forward of its class {type(module).__name__} does more than multiply. Leave it out of layers=."
            )
        if name in self._unchecked:
            self._unchecked.discard(name)
            reason = check_forward(module, rows, whole(output.detach()))
            if reason is not None:
                raise RuntimeError(
                    f"Layer {name!r} cannot be collected: {reason}. Its factors would be those of another product; "
                    "leave it out of layers=."
                )
        if not output.requires_grad and (self._is_frozen or is_under_lora(self._root, name)):
            output.requires_grad_()  # below an adapter what is added to it is trained: the gradient is that of the sum
        call = LayerCall(
            name=name,
            module=module,
            inputs=rows,
            version=version_of(rows) if nested else version,
            edge=get_gradient_edge(output) if output.requires_grad else None,
            output_shape=shape,
            output_dtype=output.dtype,
            nested=nested,
        )
        self.calls.append(call)
        if self._watch_gradients and output.requires_grad:
            output.register_hook(_keep(call.arrived, self._token))

    def see_named_logits(self, output: Any) -> None:
        """Record what the submodule or method named by the user returned."""
        with self.guarded():
            logits = getattr(output, "logits", output)
            if not isinstance(logits, Tensor):
                raise TypeError(
                    f"logits={self._logits!r} returned {type(output).__name__}, expected a tensor of logits."
                )
            if self.recording and torch.is_grad_enabled() and logits.requires_grad:
                # Which dimension holds the classes is told when the loss is known.
                counted, edge = every_position(logits.detach(), -1), get_gradient_edge(logits)
                self.losses.append(OutputLoss(logits, logits.dim() - 1, counted, edge=edge, version=version_of(logits)))

    def see_loss(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Look at one finished loss function."""
        if not self.recording:
            return
        with self.guarded():
            loss, of_entries = None, function in ENTRY_LOSSES
            if function not in OTHER_LOSSES:
                loss = (read_entry_loss if of_entries else read_loss)(function, args, kwargs, output)
            if function in OTHER_LOSSES or (loss is None and of_entries and output.requires_grad):
                compared = args[0] if args else next(iter(kwargs.values()))
                self.other_losses.append(OtherLoss(function.__name__, compared))
            elif loss is None:
                self.without_gradients = True
            elif self._logits is not None:
                self.losses_beside_named.append(loss)
            else:
                self.losses.append(loss)
                if self._watch_gradients:
                    output.register_hook(_keep(loss.arrived, self._token))

    def before_backward(self, tensor: Tensor) -> None:
        """Tell the owner that ``Tensor.backward`` is about to run."""
        if self._on_backward is not None and self.recording:
            with self.guarded():
                self._on_backward(tensor)


class _LayerHook:
    """The hook on one layer. A copy of the layer, in memory or in a file, gets a hook that does nothing."""

    def __init__(self, taps: Taps, name: str) -> None:
        self._taps, self._name = taps, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._taps.see_call(self._name, module, args, kwargs, output)

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    """Stand where a hook was."""


class _FunctionTap(TorchFunctionMode):
    def __init__(self, taps: Taps) -> None:
        super().__init__()
        self._taps = taps

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            self._taps.before_backward(args[0])
            with self._taps.paused():
                return func(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in _LOSSES:
            self._taps.see_loss(func, args, kwargs, output)
        return output


def _keep(arrived: list[Tensor], token: object) -> Callable[[Tensor], None]:
    # The hook must not refer to the call or the loss: they hold its own graph node, and the cycle would keep it alive.
    def hook(gradient: Tensor) -> None:
        if not _passes or _passes[-1] is token:
            arrived.append(gradient.detach())

    return hook
