"""Nested dicts of tensors and primitives, taken apart into named tensors and JSON, which safetensors files hold."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

_TENSOR = "tensor:"


def take_apart(tree: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return a tree with its tensors replaced by their names, under which they are put into ``tensors``.

    >>> import torch
    >>> tensors = {}
    >>> take_apart({"count": 2, "sum": torch.ones(2)}, tensors, "state")
    {'count': 2, 'sum': 'tensor:state/sum'}
    >>> tensors
    {'state/sum': tensor([1., 1.])}

    Args:
        tree: Dicts with string keys, of tensors, None, numbers, strings, and lists of these three.
        tensors: Receives the tensors.
        name: Prefix of their names.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return f"{_TENSOR}{name}"
    if isinstance(tree, dict):
        return {key: take_apart(value, tensors, f"{name}/{key}") for key, value in tree.items()}
    return tree


def put_together(tree: Any, read: Callable[[str], Tensor]) -> Any:
    """Undo :func:`take_apart`; ``read`` returns a tensor by its name."""
    if isinstance(tree, dict):
        return {key: put_together(value, read) for key, value in tree.items()}
    if isinstance(tree, str) and tree.startswith(_TENSOR):
        return read(tree.removeprefix(_TENSOR))
    return tree
