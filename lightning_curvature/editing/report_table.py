"""The table of a report: a line for each layer, or, of many, for those that differ in numbers alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from lightning_curvature._groups import grouped

HEADERS = (
    "layer",
    "energy",
    "reached",
    "kept",
    "of",
    "share",
    "changed",
    "||W'-W||/||W||",
    "cost (nats)",
    "positions",
    "not counted",
)


def edit_table(layers: Mapping[str, Any]) -> str:
    """Return what was done to layers as a table.

    Coefficients and costs of several layers on one line are added up; of other numbers the range is shown.

    Args:
        layers: By name, a :class:`~lightning_curvature.editing.LayerEdit`.
    """
    shapes = {name: (edit.total, edit.energy) for name, edit in layers.items()}
    rows = [_row(title, [layers[name] for name in names]) for title, names in grouped(shapes).items()]
    return tabulate(rows, HEADERS, disable_numparse=True, colalign=("left", *("right",) * (len(HEADERS) - 1)))


def _row(title: str, edits: Sequence[Any]) -> list[Any]:
    kept, total, changed = (sum(getattr(edit, name) for edit in edits) for name in ("kept", "total", "changed"))
    costs = [edit.predicted_loss for edit in edits]
    return [
        title,
        "" if edits[0].energy is None else f"{edits[0].energy:.3g}",
        _range([edit.energy_kept for edit in edits], "{:.4f}".format),
        kept,
        total,
        f"{kept / total:.1%}",
        f"{changed / total:.1%}",
        _range([edit.relative_change for edit in edits], "{:.3f}".format),
        "" if None in costs else f"{sum(costs):.2g}",
        _range([edit.num_inputs for edit in edits], str),
        _range([edit.dropped for edit in edits], "{:.1%}".format),
    ]


def _range(numbers: Sequence[Any], text: Callable[[Any], str]) -> str:
    ends = [text(min(numbers)), text(max(numbers))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)
