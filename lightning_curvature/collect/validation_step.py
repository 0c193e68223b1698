"""Collecting from a validation step, which was written to run without gradients.

A collected step runs once, with gradients enabled; nothing else about it changes. What it returns, and what it stores
on its module (a list of outputs, the states of a metric), is detached when it ends: its graph does not outlive it.
Calls that refuse tensors with gradients (``tensor.numpy()``) see detached ones.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_curvature.collect.collector import Collector

# Attributes in which nn.Module keeps itself; buffers can have a graph like any other attribute.
_INTERNAL = frozenset(vars(nn.Module())) - {"_buffers"}


class CollectedStep:
    """A validation step that is also collected from.

    Args:
        step: Validation step; its first argument is the batch. It computes one softmax cross-entropy, or returns its
            loss (or a dict with ``"loss"``).
        module: Owner of the step; graphs that it stores on itself or on a submodule are dropped.

    Attributes:
        collectors: They take the gradients.
    """

    def __init__(self, step: Callable[..., Any], module: nn.Module) -> None:
        functools.update_wrapper(self, step)  # Lightning reads its signature
        self.step = step
        self.module = module
        self.was_attribute = "validation_step" in vars(module)
        self.collectors: list[Collector] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the step once, with gradients enabled."""
        kept, batch = graphs(self.module), args[0] if args else kwargs.get("batch")
        try:
            with ExitStack() as stack:
                recordings = [stack.enter_context(collector.step(batch)) for collector in self.collectors]
                with torch.enable_grad():
                    with _Detaching():
                        output = self.step(*args, **kwargs)
                    for recording in recordings:
                        recording.backward(_objective(output))
        finally:
            drop_graphs(self.module, kept)
        return _Graphs([]).detached(output)


@contextmanager
def collected_from(module: nn.Module, collector: Collector) -> Iterator[None]:
    """Collect from every validation step that a module runs inside; several collectors share its steps."""
    attributes = vars(module)
    step = attributes.get("validation_step")
    if not isinstance(step, CollectedStep):
        step = CollectedStep(module.validation_step, module)  # type: ignore[arg-type]
    step.collectors.append(collector)
    attributes["validation_step"] = step
    try:
        yield
    finally:
        step.collectors.remove(collector)
        if not step.collectors:
            del attributes["validation_step"]
            if step.was_attribute:
                attributes["validation_step"] = step.step


def graphs(module: nn.Module) -> list[Tensor]:
    """Return the tensors with a graph that a module stores, such as losses that a training step has not used yet."""
    visitor = _Graphs([], collect=True)
    _visit(module, visitor)
    return visitor.met


def drop_graphs(module: nn.Module, kept: Sequence[Tensor] = ()) -> None:
    """Detach every tensor that a module or submodule stores in an attribute, a buffer, or a container in one.

    Args:
        module: The module.
        kept: Tensors that stay as they are.
    """
    _visit(module, _Graphs(kept))


def _visit(module: nn.Module, visitor: "_Graphs") -> None:
    for submodule in module.modules():
        attributes = vars(submodule)
        for name in attributes.keys() - _INTERNAL:
            value = attributes[name]
            new = visitor.detached(value)
            if new is not value:
                attributes[name] = new


class _Graphs:
    """Walks through values and their containers, and detaches tensors, or only finds them.

    Args:
        kept: Tensors to leave alone.
        collect: Find tensors and change nothing.
    """

    def __init__(self, kept: Sequence[Tensor], collect: bool = False) -> None:
        self.kept = {id(tensor): tensor for tensor in kept}
        self.collect = collect
        self.met: list[Tensor] = []
        # What a container became, by its id, which no other can have as long as it is kept here.
        self.seen: dict[int, tuple[Any, Any]] = {}

    def detached(self, value: Any) -> Any:
        """Return a value without graphs: the same object where nothing, or its items alone, had to change."""
        if isinstance(value, Tensor):
            if value.grad_fn is None or id(value) in self.kept:
                return value
            if self.collect:
                self.met.append(value)
                return value
            return value.detach()
        if not isinstance(value, (list, deque, dict, tuple)) and not _is_record(value):
            return value
        if id(value) not in self.seen:
            self.seen[id(value)] = value, value  # one that holds itself stays what it is
            self.seen[id(value)] = value, self._container_detached(value)
        return self.seen[id(value)][1]

    def _container_detached(self, value: Any) -> Any:
        if isinstance(value, (list, deque)):
            for index, item in enumerate(value):
                if (new := self.detached(item)) is not item:
                    value[index] = new
        elif isinstance(value, dict):
            for key, item in value.items():
                if (new := self.detached(item)) is not item:
                    value[key] = new
        elif isinstance(value, tuple):
            items = [self.detached(item) for item in value]
            if any(new is not old for new, old in zip(items, value, strict=True)):
                return value._make(items) if hasattr(value, "_make") else tuple(items)
        else:
            names = [field.name for field in dataclasses.fields(value)]
            changed = {
                name: new for name in names if (new := self.detached(getattr(value, name))) is not getattr(value, name)
            }
            if changed:
                return dataclasses.replace(value, **changed)
        return value


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _objective(output: Any) -> Tensor | None:
    """Return the loss that a validation step returned with its graph, or None."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad else None


class _Detaching(TorchFunctionMode):
    """Lets code that was written for ``no_grad`` read values of tensors that have a graph."""

    _READS = frozenset(
        {
            Tensor.numpy,
            Tensor.__array__,
            Tensor.__dlpack__,
            Tensor.__deepcopy__,
            Tensor.item,
            Tensor.tolist,
            Tensor.__float__,
            Tensor.__int__,
            Tensor.__bool__,
        }
    )

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._READS:
            args = (args[0].detach(), *args[1:])
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__")
        if kwargs.get("out") is not None or (in_place and isinstance(args[0], Tensor) and _is_trained(args[0])):
            with torch.no_grad():  # as it would run: parameters may be written to
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _is_trained(tensor: Tensor) -> bool:
    return tensor.is_leaf and tensor.requires_grad
