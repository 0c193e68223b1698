"""Nested dicts of tensors and primitives, taken apart into named tensors and JSON, which safetensors files hold.

JSON that is read is checked here, since a file may be damaged, or be no file of this package.
"""

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

_TENSOR = "tensor:"
COPY_AGAIN = "Copy the file again from where it was written."


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
        tensors: Receives copies of the tensors, on the CPU.
        name: Prefix of their names.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return f"{_TENSOR}{name}"
    if isinstance(tree, dict):
        return {key: take_apart(value, tensors, f"{name}/{key}") for key, value in tree.items()}
    return tree


def put_together(tree: Any, read: Callable[[str], Tensor]) -> Any:
    """Undo :func:`take_apart`: return a tree with its tensors; ``read`` returns a tensor by its name."""
    if isinstance(tree, dict):
        return {key: put_together(value, read) for key, value in tree.items()}
    if isinstance(tree, str) and tree.startswith(_TENSOR):
        return read(tree.removeprefix(_TENSOR))
    return tree


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        text: JSON; bytes are UTF-8.
        what: The file, and the part of it that the text is, for errors.

    Raises:
        ValueError: If the text is no JSON object.
    """
    try:
        value = json.loads(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and numbers of thousands of digits
        raise ValueError(f"{what} is not JSON ({error}). {COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object, found {type(value).__name__}. {COPY_AGAIN}")
    return value


def is_text(value: Any) -> bool:
    r"""Tell whether a value is a string that can be written as UTF-8: JSON may hold halves of characters.

    >>> is_text("ü"), is_text("\ud800"), is_text(None)
    (True, False, False)
    """
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value
