"""What the benchmarks of time and memory use: rounds in which variants take turns, peak memory, results in a file."""

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .environment import PACKAGES, machine, versions
from .tables import table

LIBRARIES = ("curvlinops-for-pytorch", "kronfluence")


def in_turn(variants: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Run each variant once in every round, and return its seconds of each round; the warm-up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(warm_up + rounds):
        for name, work in variants.items():
            gc.collect()
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if index >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def quotients(values: Sequence[float], divisors: Sequence[float]) -> list[float]:
    """Return each value over the divisor of the same round."""
    return [value / divisor for value, divisor in zip(values, divisors, strict=True)]


def ratios(seconds: Mapping[str, list[float]], name: str, to: str) -> list[float]:
    """Return the ratio of two variants in each round."""
    return quotients(seconds[name], seconds[to])


def extras(seconds: Mapping[str, list[float]], name: str, to: str = "plain") -> list[float]:
    """Return the time beyond that of another variant in each round, in units of the latter."""
    return [ratio - 1 for ratio in ratios(seconds, name, to)]


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median of some values, with their range."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return how many bytes more than before are allocated at the worst moment of some work, by torch's profiler."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    live = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def show(title: str, rows: Sequence[Sequence[object]], headers: Sequence[str]) -> None:
    """Print a table under its title."""
    print(f"\n{title}\n\n{table(rows, headers)}", flush=True)


def write(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results with the environment, if there is a file to write to."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = {**machine(), "versions": versions((*PACKAGES, *LIBRARIES))}
        path.write_text(json.dumps({"environment": environment, **results}, indent=1) + "\n", encoding="utf-8")
