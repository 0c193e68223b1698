"""Pictures of edits: what was measured to choose one, and how far layers move."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from lightning_curvature.analysis.style import BLUE, GREEN, GREY, MEMORIZED, ORANGE


def choice_curves(rows: Sequence[Mapping[str, Any]], name: str, budget: float) -> Figure:
    """Draw accuracy on training and on validation batches against the budget, for each candidate.

    Args:
        rows: ``edit``, ``budget``, ``training error`` and further errors of each edit; of budget 0 the unedited model.
        name: The edit that was chosen.
        budget: Its budget, in nats; 0 if none was.
    """
    names = list(dict.fromkeys(row["edit"] for row in rows))
    figure = Figure(figsize=(5.0 * len(names), 4.2), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axes, edit in zip(grid, names, strict=True):
        points = [row for row in rows if row["edit"] == edit]
        errors = [key for key in points[0] if key.endswith("error")]
        for error, color in zip(errors, (MEMORIZED, GREEN, BLUE, ORANGE, GREY), strict=False):
            unedited = 100 * (1 - points[0][error])
            budgets = [row["budget"] for row in points if row["budget"]]
            rates = [100 * (1 - row[error]) for row in points if row["budget"]]
            label = error.replace("error", "batches")
            axes.plot(budgets, rates, "o-", markersize=4, color=color, label=label)
            axes.axhline(unedited, color=color, linewidth=0.8, linestyle=":")
        if edit == name and budget:
            axes.axvline(budget, color="black", linewidth=1.0, linestyle="--", label=f"chosen: {budget:.2g}")
        axes.set(xscale="log", xlabel="predicted cost, nats", title=edit)
        axes.xaxis.set_minor_formatter(NullFormatter())  # which would overlap where there is one decade alone
        axes.grid(alpha=0.25)
    grid[0].set(ylabel="accuracy, % (dotted: before the edit)")
    grid[-1].legend(loc="lower left", fontsize=8)
    return figure


def layer_map(edits: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw, for each edited layer, the share of its coefficients that is kept and its relative change.

    Args:
        edits: By layer, the fields of :class:`lightning_curvature.editing.report.LayerEdit`.
    """
    names = list(edits)
    figure = Figure(figsize=(10.0, 1.0 + 0.28 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(names, [100 * edit["kept"] / edit["total"] for edit in edits.values()], color=BLUE)
    left.set(xlabel="coefficients kept, %")
    right.barh(names, [edit["relative_change"] for edit in edits.values()], color=MEMORIZED)
    right.set(xlabel="relative change of the weight", xlim=(0, 1.0))
    left.invert_yaxis()
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, axis="x")
    return figure
