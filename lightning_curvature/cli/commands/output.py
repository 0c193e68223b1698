"""What every command returns."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple


class Output(NamedTuple):
    """What a command says: text for people, JSON values for ``--json``."""

    text: str
    data: Any


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra to install where an import fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise RuntimeError(f"This command needs {error.name}: pip install 'lightning_curvature[{name}]'") from error
