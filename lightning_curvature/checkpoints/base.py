"""TODO."""

from collections.abc import Callable, Mapping

from torch import Tensor

Edits = Mapping[str, Callable[[], Tensor]]
"""By tensor name, what returns the new tensor."""


def check_same(name: str, old: Tensor, new: Tensor) -> None:
    """Raise ``ValueError`` if an edited tensor does not have the shape and dtype of the original."""
    if new.shape != old.shape or new.dtype != old.dtype:
        raise ValueError(
            f"Tensor {name!r} is {old.dtype} {list(old.shape)}, the new one {new.dtype} {list(new.shape)}."
        )
