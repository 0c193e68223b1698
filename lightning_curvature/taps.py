"""Every hook of the package: layer inputs, layer output gradients, and the logits of the loss.

All hooks live inside :class:`Taps`, a context manager: none outlives it, whatever happens inside. While it is open it
records

- each call of a watched layer: the input, and the place of the output in the autograd graph (a gradient edge, taken
  before a later in-place operation can move it, so that ``relu_`` after a layer does not change what is measured);
- each softmax cross-entropy: ``F.cross_entropy`` (and ``nn.CrossEntropyLoss``), and ``F.nll_loss`` of log-softmax
  outputs, seen by a :class:`torch.overrides.TorchFunctionMode`.

It changes nothing that it sees.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from lightning_curvature._checks import did_you_mean
from lightning_curvature.compiled import uncompiled
from lightning_curvature.losses import OTHER_LOSSES, SOFTMAX_LOSSES, SoftmaxLoss, read_loss

_OVERWRITTEN = (
    "Layer {!r}: its input was changed in place after the layer read it, so it can no longer be measured. Replace the "
    "in-place operation (x += y becomes x = x + y)."
)


@dataclass(eq=False)
class LayerCall:
    """One call of a watched layer.

    Args:
        name: Module name of the layer.
        module: The layer.
        inputs: What it read, detached.
        version: Version counter of the input at the time of the call.
        edge: Its output in the autograd graph; None if the output needs no gradient.
        output_shape: Shape of its output.
        output_dtype: Dtype of its output.
        arrived: Gradients of the training loss that arrived at the output (only if the tap watches them).
    """

    name: str
    module: nn.Module
    inputs: Tensor
    version: int
    edge: GradientEdge | None
    output_shape: torch.Size
    output_dtype: torch.dtype
    arrived: list[Tensor] = field(default_factory=list)

    @property
    def gradient(self) -> Tensor | None:
        """The gradient that the training's backward sent to the output, or None."""
        return sum(self.arrived[1:], self.arrived[0]) if self.arrived else None

    def check_input(self) -> None:
        """Raise if the input was overwritten after the layer read it."""
        if _version(self.inputs) != self.version:
            raise RuntimeError(_OVERWRITTEN.format(self.name))


_LOSSES = frozenset([*SOFTMAX_LOSSES, *OTHER_LOSSES])
_passes: list[object] = []  # tokens of the recorders whose own backward pass is running


class Taps:
    """Context manager that records layer calls and softmax losses of whatever runs inside.

    Args:
        root: The network.
        modules: Layers to watch, by name.
        logits: Name of a submodule or method of ``root`` whose return value is the logits; None to find the loss.
        watch_gradients: Also record the gradients that the training backward sends to the watched outputs.
        on_backward: Called with the loss just before ``Tensor.backward`` runs.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        logits: str | None = None,
        watch_gradients: bool = False,
        on_backward: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.calls: list[LayerCall] = []
        self.losses: list[SoftmaxLoss] = []
        self.without_gradients = False
        self.without_graph: set[str] = set()
        self.other_losses: list[str] = []
        self.recording = True
        self._root = root
        self._modules = modules
        self._logits = logits
        self._watch_gradients = watch_gradients
        self._on_backward = on_backward
        self._stack = ExitStack()
        self._token = object()

    def __enter__(self) -> "Taps":
        with ExitStack() as stack:
            for name, module in self._modules.items():
                hook = self._layer_hook(name)
                handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            if self._logits is not None:
                self._tap_named_logits(self._logits, stack)
            stack.enter_context(uncompiled(self._token))
            stack.enter_context(_FunctionTap(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove every hook and forget what was recorded."""
        self._stack.close()
        self.calls, self.losses = [], []

    @contextmanager
    def own_pass(self) -> Iterator[None]:
        """Run backward passes of this recorder's own, which the hooks of other ones do not take for the training's."""
        _passes.append(self._token)
        try:
            yield
        finally:
            _passes.remove(self._token)

    def _layer_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not (self.recording and torch.is_grad_enabled()):
                self.without_graph.add(name)
                return
            with torch._C.DisableTorchFunction():  # or the function mode would see each attribute that is read here
                self._record(name, module, args[0] if args else next(iter(kwargs.values())), output)

        return hook

    def _record(self, name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> None:
        on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"Layer {name!r} runs while a CUDA graph is captured, whose replay calls no hook. Collect without "
                "CUDA graphs."
            )
        call = LayerCall(
            name=name,
            module=module,
            inputs=inputs.detach(),
            version=_version(inputs),
            edge=get_gradient_edge(output) if output.requires_grad else None,
            output_shape=output.shape,
            output_dtype=output.dtype,
        )
        self.calls.append(call)
        if self._watch_gradients and output.requires_grad:
            output.register_hook(_keep(call.arrived, self._token))  # type: ignore[no-untyped-call]

    def _tap_named_logits(self, name: str, stack: ExitStack) -> None:
        target: Any = self._root
        for part in name.split("."):
            target = getattr(target, part, None)
        if isinstance(target, nn.Module):
            handle = target.register_forward_hook(lambda _module, _args, output: self.add_named_logits(output))
            stack.callback(handle.remove)
            return
        if not callable(target):
            options = [*(n for n, _ in self._root.named_modules() if n), *_own_methods(self._root)]
            raise ValueError(
                f"logits={name!r} is neither a submodule nor a method of {type(self._root).__name__}."
                f"{did_you_mean(name, options)}"
            )
        parent_name, _, attribute = name.rpartition(".")
        parent = self._root.get_submodule(parent_name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            output = target(*args, **kwargs)
            self.add_named_logits(output)
            return output

        own = parent.__dict__.get(attribute)
        parent.__dict__[attribute] = wrapper
        if own is None:
            stack.callback(parent.__dict__.pop, attribute)
        else:
            stack.callback(parent.__dict__.__setitem__, attribute, own)

    def add_named_logits(self, output: Any) -> None:
        """Record what the submodule or method named by the user returned."""
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits={self._logits!r} returned {type(output).__name__}, expected a tensor of logits.")
        if self.recording and logits.requires_grad:
            counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
            self.losses.append(SoftmaxLoss(logits, logits.dim() - 1, counted))

    def see(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Look at one finished loss function."""
        if not self.recording or self._logits is not None:
            return
        if function in SOFTMAX_LOSSES:
            loss = read_loss(function, args, kwargs, output)
            if loss is None:
                self.without_gradients = True
            else:
                self.losses.append(loss)
                if self._watch_gradients:
                    output.register_hook(_keep(loss.arrived, self._token))
        else:
            self.other_losses.append(OTHER_LOSSES[function])

    def before_backward(self, loss: Tensor) -> None:
        """Tell the owner that ``Tensor.backward`` is about to run."""
        if self._on_backward is not None:
            self._on_backward(loss)


@contextmanager
def layer_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Record what some layers read while the block runs: by name, the inputs of its calls, detached.

    Raises:
        RuntimeError: If an input was changed in place after the layer read it.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    versions: dict[str, list[int]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            found[name].append(inputs.detach())
            versions[name].append(_version(inputs))

        return keep

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name), prepend=True, with_kwargs=True)
            stack.callback(handle.remove)
        yield found
    for name, inputs in found.items():
        if [_version(tensor) for tensor in inputs] != versions[name]:
            raise RuntimeError(_OVERWRITTEN.format(name))


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
        output = func(*args, **kwargs)
        if func in _LOSSES:
            self._taps.see(func, args, kwargs, output)
        return output


def _keep(arrived: list[Tensor], token: object) -> Callable[[Tensor], None]:
    # The hook must not refer to the call or the loss: they hold its own graph node, and the cycle would keep it alive.
    def hook(gradient: Tensor) -> None:
        if not _passes or _passes[-1] is token:
            arrived.append(gradient.detach())

    return hook


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _own_methods(root: nn.Module) -> list[str]:
    return [name for name, value in vars(type(root)).items() if callable(value) and not name.startswith("_")]


def ancestors(start: Node | None, barrier: Node | None = None) -> Iterator[Node]:
    """Walk down the autograd graph from ``start``, which comes first, and not past ``barrier``."""
    stack, seen = [start], {barrier}
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        yield node
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions)


def reaches(start: Node | None, goals: set[Node], barrier: Node | None = None) -> bool:
    """Tell whether a walk down the autograd graph from ``start`` meets a goal without passing ``barrier``."""
    return any(node in goals for node in ancestors(start, barrier))
