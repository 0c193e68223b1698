"""Steps of a module, run again: nothing that they leave behind stays."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

_INTERNAL = frozenset(vars(nn.Module())) - {"_buffers"}
"""Attributes in which nn.Module keeps itself."""


@contextmanager
def without_trace(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
    """Let steps of a module run in a ``with`` block, and put back what they change.

    Logged values go nowhere. Buffers, attributes, the states of metrics, and lists and dicts that a step appends to are
    what they were, in place.

    Args:
        trainer: The Trainer.
        module: The module.
    """
    with ExitStack() as stack:
        kept = _Kept()
        kept.keep_module(module)
        stack.callback(kept.restore)
        loggers = trainer.loggers
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        for name in ("log", "log_dict"):
            vars(module)[name] = _nothing  # kept.restore takes it away
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Take any arguments, and do nothing."""


class _Kept:
    """Contents of modules and containers, to be put back in place."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # which also keeps them alive, so that no other object gets their id
        self._undo: list[Callable[[], None]] = []

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad(), ExitStack() as stack:  # each is done, whatever becomes of the others
            for undo in self._undo:
                stack.callback(undo)

    def keep_module(self, module: nn.Module) -> None:
        """Keep the attributes of a module and of the modules in it."""
        for submodule in module.modules():
            if id(submodule) not in self._seen:
                self._seen[id(submodule)] = submodule
                attributes = vars(submodule)
                saved = {name: value for name, value in attributes.items() if name not in _INTERNAL}
                self._undo.append(partial(_put_back, attributes, saved))
                for value in saved.values():
                    self._keep(value)

    def _keep(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            self.keep_module(value)
        elif id(value) not in self._seen and isinstance(value, (Tensor, list, deque, dict, set)):
            self._seen[id(value)] = value
            if isinstance(value, Tensor):
                saved = value.detach().clone()
                self._undo.append(partial(_copy_back, value, saved))
                return
            items = dict(value) if isinstance(value, dict) else list(value)
            self._undo.append(partial(_fill, value, items))
            for item in items.values() if isinstance(items, dict) else items:
                self._keep(item)
        elif isinstance(value, np.ndarray):
            self._undo.append(partial(np.copyto, value, value.copy()))
        elif isinstance(value, tuple):
            for item in value:
                self._keep(item)
        elif id(value) not in self._seen and _is_plain(value):
            self._seen[id(value)] = value
            self._undo.append(partial(_put_back, vars(value), dict(vars(value))))
            for item in vars(value).values():
                self._keep(item)


def _is_plain(value: Any) -> bool:
    """Tell whether a value is an object of somebody's own class that keeps its state in attributes, such as a meter."""
    library = type(value).__module__.partition(".")[0] in ("torch", "lightning", "lightning_curvature", "builtins")
    return hasattr(value, "__dict__") and not (library or callable(value) or isinstance(value, ModuleType))


def _put_back(attributes: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in attributes.keys() - saved.keys() - _INTERNAL:
        del attributes[name]
    attributes.update(saved)


def _copy_back(tensor: Tensor, saved: Tensor) -> None:
    if tensor.layout != torch.strided or not torch.equal(tensor, saved):
        tensor.detach().copy_(saved)


def _fill(container: Any, items: Any) -> None:
    """Give a container its items back."""
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(items)
    else:
        container.extend(items)
