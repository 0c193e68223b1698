"""What work costs a process: seconds, resident memory (Linux), backward passes."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch


@dataclass
class Cost:
    """What something took: seconds, MiB of memory beyond what the process held before, and backward passes."""

    seconds: float = 0.0
    memory: float = 0.0
    passes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        memory = max(self.memory, other.memory)
        return Cost(self.seconds + other.seconds, memory, self.passes + other.passes)


@contextmanager
def measured() -> Iterator[Cost]:
    """Measure what happens inside; the memory is the peak that Linux reports, which is reset first."""
    cost = Cost()
    run = torch.autograd._engine_run_backward

    def counted(*args, **options):
        cost.passes += 1
        return run(*args, **options)

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free already goes back, or it would hide what is taken
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    with mock.patch("torch.autograd._engine_run_backward", counted):
        yield cost
    cost.seconds, cost.memory = time.perf_counter() - start, (resident("VmHWM") - before) / 2**20


def resident(kind: str) -> int:
    """Return the resident memory of this process in bytes: ``"VmRSS"``, or its peak so far, ``"VmHWM"``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(kind)))


def forget_peak() -> None:
    """Let the peak of the resident memory start from what is held."""
    Path("/proc/self/clear_refs").write_text("5")
