"""Means over seeds, and tables inside a page of the docs."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

DOCS = Path(__file__).parents[2] / "docs"

Columns = Mapping[str, tuple[str, float, int]]
"""Title, factor and digits of each column."""


def mean(values: Sequence[float], of: int, digits: int) -> str:
    """Return mean and sample standard deviation; says so if there are fewer values than there should be."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}{_fewer(len(values), of)}"


def _fewer(count: int, of: int) -> str:
    return f" ({count} of {of} seeds)" if count < of else ""


def summary(runs: Sequence[Mapping[str, Mapping[str, float]]], columns: Columns) -> str:
    """Return rows by name as a table, mean and spread over runs.

    Args:
        runs: For each seed, by row, by column: a number.
        columns: Title, factor and digits of each column.
    """
    names = list(dict.fromkeys(name for run in runs for name in run))
    body = []
    for name in names:
        rows = [run.get(name, {}) for run in runs]
        values = {column: [row[column] for row in rows if column in row] for column in columns}
        counts = {len(numbers) for numbers in values.values() if numbers}
        of = counts.pop() if len(counts) == 1 else len(runs)  # fewer seeds of a whole row are told once
        cells = [
            mean([scale * number for number in values[column]], of, digits)
            for column, (_, scale, digits) in columns.items()
        ]
        body.append([name + _fewer(of, len(runs)), *cells])
    return table(body, ["", *(title for title, _, _ in columns.values())])


def by_row(runs: Iterable[Sequence[Mapping[str, object]]], title: str) -> list[dict[str, Mapping[str, object]]]:
    """Return what each run yielded for one table, by the name of the row."""
    return [{str(row["row"]): row for row in run if row["table"] == title} for run in runs]


def all_tables(runs: Sequence[Sequence[Mapping[str, object]]], digits: Mapping[str, int]) -> str:
    """Return every table of some runs under its title.

    Args:
        runs: For each seed, rows that name their ``"table"`` and their ``"row"`` beside numbers.
        digits: Of the numbers of a table; of those that are not named, 3.
    """
    parts = []
    for title in dict.fromkeys(str(row["table"]) for run in runs for row in run):
        rows = by_row(runs, title)
        keys = dict.fromkeys(key for run in rows for row in run.values() for key in row if key not in ("table", "row"))
        text = summary(rows, {key: (key, 1.0, digits.get(title, 3)) for key in keys})
        parts += [f"**{title[0].upper()}{title[1:]}**", "", text, ""]
    return "\n".join(parts)


def table(body: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
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
