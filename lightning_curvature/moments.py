"""A streaming, mergeable second moment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SecondMoment:
    """Uncentred second moment ``E[x x^T]`` of rows that arrive in batches.

    Products are taken in float32 (float64 for float64 rows) and summed in float64, so that a million small batches
    lose nothing; the number of rows is a Python integer.

    Args:
        dim: Length ``d`` of a row.
        device: Where the ``[d, d]`` sum lives.

    >>> moment = SecondMoment(2)
    >>> moment.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> moment.mean()
    tensor([[1., 1.],
            [1., 2.]])
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.count = 0
        self.dtype = torch.float32

    @torch.no_grad()
    def add(self, rows: Tensor, count: int | None = None) -> None:
        """Add rows ``[n, d]``, any floating dtype; ``count`` positions (default ``n``) stand behind them."""
        self.dtype = torch.promote_types(self.dtype, rows.dtype)
        rows = rows.to(self.dtype)
        # A step may still be running in its own precision, and a process allow products of fewer bits than it asks for.
        with torch.autocast(rows.device.type, enabled=False), full_precision():
            self.total += (rows.T @ rows).to(self.total.device)
        self.count += rows.shape[0] if count is None else count

    def mean(self) -> Tensor:
        """Return the moment ``[d, d]`` in float32, or float64 if float64 rows came in; zeros if none did."""
        return (self.total / max(self.count, 1)).to(self.dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """Take float32 products in float32, whatever ``torch.set_float32_matmul_precision`` allows (TF32, bfloat16)."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    settings: list[tuple[Any, str, Any]]
    settings = [(backend, "fp32_precision", "ieee") for backend in backends if hasattr(backend, "fp32_precision")]
    settings = settings or [(torch.backends.cuda.matmul, "allow_tf32", False)]  # before torch 2.9
    before = [(backend, name, getattr(backend, name)) for backend, name, _ in settings]
    try:
        for backend, name, value in settings:
            setattr(backend, name, value)
        yield
    finally:
        for backend, name, value in before:
            setattr(backend, name, value)
