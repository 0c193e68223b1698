"""A benchmark that trains models: run seed by seed, its file of results, and its tables in the docs."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .environment import environment, parser, quiet
from .tables import DOCS, replace_section

RESULTS = Path(__file__).parents[1] / "results"

Row = dict[str, object]
Results = Callable[[argparse.Namespace, int], Iterator[Row]]
Tables = Callable[[str, list[Any]], str]


def seeds_parser(doc: str | None, data: Sequence[str]) -> argparse.ArgumentParser:
    """Return the arguments of a benchmark on some data sets, ``tables`` among them."""
    arguments = parser(doc)
    arguments.add_argument("data", choices=[*data, "tables"])
    arguments.add_argument("--root", type=Path, help="folder with WikiText-2 and the Dolma texts, or with MNIST/raw")
    arguments.add_argument("--models", type=Path, default=Path("runs/models"), help="folder for the trained models")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--out", type=Path, help="JSON file; by default benchmarks/results/BENCHMARK-DATA.json")
    return arguments


def run(name: str, args: argparse.Namespace, results: Results) -> list[Any]:
    """Run a benchmark seed by seed, write its file after each seed, and go on where an earlier run stopped.

    Args:
        name: Of the benchmark.
        args: Arguments as of :func:`seeds_parser`.
        results: Yields the rows of a seed.

    Returns:
        The rows of each seed.
    """
    torch.set_num_threads(args.threads)
    quiet()
    path = args.out or RESULTS / f"{name}-{args.data}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text())["runs"] if path.exists() else {}
    for seed in range(args.seeds):
        if str(seed) in runs:
            continue
        rows = []
        for row in results(args, seed):
            rows.append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
            print(seed, rows[-1], flush=True)
        runs[str(seed)] = rows
        path.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1))
    return list(runs.values())


def read(name: str, data: str) -> tuple[list[Any], str]:
    """Return the results of a benchmark by seed, and a line that says what they may depend on."""
    content = json.loads((RESULTS / f"{name}-{data}.json").read_text())
    facts = ", ".join(f"{key} {value}" for key, value in content["environment"].items())
    count = len(content["runs"])
    return list(content["runs"].values()), f"{count} seed{'s' if count > 1 else ''}; {facts}"


def run_or_write(
    name: str, args: argparse.Namespace, results: Results, tables: Tables, page: str, data: Sequence[str]
) -> None:
    """Run a benchmark and print its tables, or put those of its results into the docs, as the arguments say.

    Args:
        name: Of the benchmark.
        args: Arguments as of :func:`seeds_parser`.
        results: As of :func:`run`.
        tables: As of :func:`write_sections`.
        page: File in ``docs/``.
        data: Data sets that are shown there.
    """
    if args.data == "tables":
        write_sections(name, data, page, tables)
    else:
        print(tables(args.data, run(name, args, results)))


def write_sections(name: str, data: Sequence[str], page: str, tables: Tables) -> None:
    """Put the tables of a benchmark's results into a page of the docs, one section for each data set.

    Args:
        name: Of the benchmark.
        data: Names of the data sets.
        page: File in ``docs/``.
        tables: Makes the tables from the name of a data set and its runs.
    """
    for data_set in data:
        runs, facts = read(name, data_set)
        text = tables(data_set, runs).rstrip("\n")
        replace_section(DOCS / page, f"{name}-{data_set}", f"\n{text}\n\n{facts}\n")
