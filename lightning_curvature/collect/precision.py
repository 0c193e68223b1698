"""The precision of the products of a batch."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device_types: Iterable[str]) -> Iterator[None]:
    """Take products in the precision of their operands inside a ``with`` block.

    The training step, which still runs, may have chosen less: autocast, or TF32 and bfloat16 for float32
    (``torch.set_float32_matmul_precision``).
    """
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends = tuple(backend for backend in backends if hasattr(backend, "fp32_precision"))
    with ExitStack() as stack:
        for kind in device_types:
            stack.enter_context(torch.autocast(kind, enabled=False))
        for backend in backends:
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        if not backends:  # before torch 2.9
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
