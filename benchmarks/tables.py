"""What the benchmarks share: costs, the environment, means over seeds, and tables inside a page of the docs."""

import argparse
import ctypes
import datetime
import gc
import json
import logging
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
import transformers
from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"


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
    Path("/proc/self/clear_refs").write_text("5")
    held, started = _resident("VmRSS"), time.perf_counter()
    with mock.patch("torch.autograd._engine_run_backward", counted):
        yield cost
    cost.seconds, cost.memory = time.perf_counter() - started, _resident("VmHWM") - held


def _resident(kind: str) -> float:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1024


def environment() -> dict[str, object]:
    """Return what the numbers may depend on."""
    return {
        "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": pl.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
    }


def parser(doc: str, data: Sequence[str]) -> argparse.ArgumentParser:
    """Return the arguments that the benchmarks of :mod:`subjects` have in common."""
    arguments = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", choices=[*data, "tables"])
    arguments.add_argument("--root", type=Path, help="folder with WikiText-2 and the Dolma texts, or with MNIST/raw")
    arguments.add_argument("--models", type=Path, default=Path("runs/models"), help="folder for the trained models")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--out", type=Path, help="JSON file; by default benchmarks/results/BENCHMARK-DATA.json")
    return arguments


def run(name: str, args: argparse.Namespace, results: Callable[[int], Iterator[dict[str, object]]]) -> dict[str, Any]:
    """Run a benchmark seed by seed, write its file after each seed, and go on where an earlier run stopped.

    Returns:
        What the file holds: ``environment``, and ``runs``, the results by seed.
    """
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    path = args.out or RESULTS / f"{name}-{args.data}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(path.read_text())["runs"] if path.exists() else {}
    for seed in range(args.seeds):
        if str(seed) in done:
            continue
        rows = []
        for row in results(seed):
            rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
            print(seed, rows[-1], flush=True)
        done[str(seed)] = rows
        path.write_text(json.dumps({"environment": environment(), "runs": done}, indent=1))
    return {"environment": environment(), "runs": done}


def read(name: str, data: str) -> tuple[list[Any], str]:
    """Return the results of a benchmark by seed, and a line that says what they may depend on."""
    found = json.loads((RESULTS / f"{name}-{data}.json").read_text())
    facts = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
    seeds = len(found["runs"])
    return list(found["runs"].values()), f"{seeds} seed{'s' if seeds > 1 else ''}; {facts}"


def mean(values: Sequence[float], of: int, digits: int) -> str:
    """Return mean and sample standard deviation; says so if there are fewer values than there should be."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    fewer = f" ({len(values)} of {of} seeds)" if len(values) < of else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{fewer}"


def summary(runs: Sequence[Mapping[str, Mapping[str, float]]], columns: Mapping[str, tuple[str, float, int]]) -> str:
    """Return rows by name as a table, mean and spread over runs.

    Args:
        runs: For each seed, by row, by column: a number.
        columns: Title, factor and digits of each column.
    """
    names = list(dict.fromkeys(name for run in runs for name in run))
    body = []
    for name in names:
        found = [run.get(name, {}) for run in runs]
        cells = [
            mean([scale * row[column] for row in found if column in row], len(runs), digits)
            for column, (_, scale, digits) in columns.items()
        ]
        body.append([name, *cells])
    return table(body, ["", *(title for title, _, _ in columns.values())])


def table(body: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Return a Markdown table."""
    return tabulate(body, headers, tablefmt="github", disable_numparse=True)


def replace_section(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` of a page."""
    old = page.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    new, count = re.subn(
        f"({re.escape(begin)}).*?({re.escape(end)})", lambda m: f"{m[1]}\n{text}\n{m[2]}", old, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{page} must hold {begin} and {end} once.")
    page.write_text(new, encoding="utf-8")
