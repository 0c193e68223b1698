"""Pictures. Every function returns a matplotlib figure that belongs to no window."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from lightning_curvature.analysis.style import BLUE, GREEN, GREY, MEMORIZED, ORANGE, PALE
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.storage.atomic import replacing

_COLORS = {
    "memorized": MEMORIZED,
    "recovered": BLUE,
    "val_accuracy": GREEN,
    "clean_train": GREY,
    "strict": MEMORIZED,
    "unseen_strict": ORANGE,
    "perplexity": BLUE,
    "domain_perplexity": GREEN,
}
_ENERGY = "energy: kept share of the curvature mass"
_LABELS = {
    "memorized": "noised labels recited",
    "recovered": "true labels recovered",
    "val_accuracy": "validation accuracy",
    "clean_train": "accuracy on clean training labels",
}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, atomically."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def spectrum(factors: LayerFactors, energy: float, layer: str = "") -> Figure:
    """Draw the joint spectrum ``lam_i mu_j`` of a layer with the staircase of the kept pairs.

    Args:
        factors: The layer's factors.
        energy: Kept share of the mass.
        layer: Name for the title.
    """
    basis = factors.basis
    staircase = select_staircase(basis.lam, basis.mu, energy)
    mass = (basis.lam[:, None] * basis.mu).cpu()
    mass = mass / mass.sum()
    shown = mass.clamp(min=float(mass.max()) * 1e-12)
    figure = Figure(figsize=(7.5, 5.0), layout="constrained")
    axes: Axes = figure.subplots()
    rows, columns = mass.shape
    x, y = np.arange(1, columns + 2), np.arange(1, rows + 2)
    image = axes.pcolormesh(x, y, shown.numpy(), norm=LogNorm(), cmap="viridis", rasterized=True)
    # The line runs along the right edge of each row's kept prefix, in the same coordinates as the cells.
    edge = np.append(staircase.columns.cpu().numpy(), 0) + 1
    axes.step(edge, y, where="pre", color="white", linewidth=3.5)
    axes.step(
        edge,
        y,
        where="pre",
        color=MEMORIZED,
        linewidth=1.8,
        label=f"kept: {staircase.kept:,} of {mass.numel():,} pairs hold {staircase.energy_kept:.1%}",
    )
    axes.set(xscale="log", yscale="log", xlim=(1, columns + 1), ylim=(rows + 1, 1))
    axes.set_xlabel("j: eigenvector of A (layer inputs), strongest first")
    axes.set_ylabel("i: eigenvector of G (output gradients), strongest first")
    axes.set_title(f"Curvature mass of {layer}".strip())
    axes.legend(loc="lower left", framealpha=0.95)
    figure.colorbar(image, ax=axes, label="share of the total curvature mass")
    return figure


def energy_curves(
    curve: Mapping[float, Mapping[str, float]], before: Mapping[str, float], chosen: float | None = None
) -> Figure:
    """Draw each metric against the kept energy, with its value before the edit as a thin line.

    Args:
        curve: Metrics by energy.
        before: Metrics of the unedited model.
        chosen: Energy to mark.
    """
    figure = Figure(figsize=(10.0, 4.6), layout="constrained")
    axes: Axes = figure.subplots()
    _rates(axes, curve, before, _LABELS, chosen)
    axes.set_title("Forgetting against energy (dotted: before the edit)")
    _legend_beside(axes)
    return figure


def recitation_curves(
    curve: Mapping[float, Mapping[str, float]], before: Mapping[str, float], chosen: float | None = None
) -> Figure:
    """Draw recitation, and perplexity as a multiple of what it was, against the kept energy.

    Args:
        curve: ``strict``, ``unseen_strict``, ``perplexity`` and ``domain_perplexity`` by energy.
        before: The same metrics of the unedited model.
        chosen: Energy to mark.
    """
    figure = Figure(figsize=(10.0, 6.4), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    labels = {"strict": "memorized, recited exactly", "unseen_strict": "unseen, recited exactly"}
    _rates(top, curve, before, labels, chosen)
    top.set(xlabel="", title="Recitation and perplexity against energy (dotted: before the edit)")
    energies = sorted(curve)
    for metric, label in (("perplexity", "clean text"), ("domain_perplexity", "memorized domain")):
        ratios = [curve[energy][metric] / before[metric] for energy in energies]
        bottom.plot(energies, ratios, "o-", markersize=4, color=_COLORS[metric], label=label)
    bottom.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    if chosen is not None:
        bottom.axvline(chosen, color="black", linewidth=1.0, linestyle="--")
    bottom.set(ylabel="perplexity, times before", xlabel=_ENERGY)
    bottom.grid(alpha=0.25)
    for axes in (top, bottom):
        _legend_beside(axes)
    return figure


def pareto(rows: Sequence[Mapping[str, Any]], front: Sequence[Mapping[str, Any]], x: str, y: str) -> Figure:
    """Draw the rows of a sweep, each edit in its own colour, and the front: the rows that no other row beats.

    Args:
        rows: As :func:`lightning_curvature.search.sweep.sweep` returns them, the unedited model first.
        front: As :func:`lightning_curvature.search.sweep.pareto` returns it.
        x: Metric on the horizontal axis.
        y: Metric on the vertical axis.
    """
    figure = Figure(figsize=(9.0, 5.2), layout="constrained")
    axes: Axes = figure.subplots()
    names = dict.fromkeys(row["edit"] for row in rows[1:])
    for name in names:
        points = sorted((row for row in rows if row["edit"] == name), key=lambda row: float(row["energy"]))
        axes.plot(
            [row[x] for row in points],
            [row[y] for row in points],
            "o-",
            markersize=5,
            linewidth=1,
            alpha=0.8,
            label=name,
        )
    axes.plot(
        [row[x] for row in front],
        [row[y] for row in front],
        "s",
        markersize=11,
        fillstyle="none",
        color="black",
        label="not beaten by another",
    )
    for row in front:
        if row is not rows[0]:
            axes.annotate(f"{row['energy']:g}", (row[x], row[y]), textcoords="offset points", xytext=(8, 6), fontsize=8)
    axes.plot(rows[0][x], rows[0][y], "*", markersize=14, color=MEMORIZED, label=rows[0]["edit"])
    # A few destroyed models must not squeeze the others into a corner.
    finite = [row[x] for row in rows if row[x] < float("inf")]
    axes.set(
        xlabel=x,
        ylabel=y,
        title=f"{y} against {x} (numbers: energies)",
        xlim=(None, min(max(finite), 2 * rows[0][x]) * 1.02) if rows[0][x] > 0 else None,
    )
    axes.grid(alpha=0.25)
    _legend_beside(axes)
    return figure


def _legend_beside(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _rates(
    axes: Axes,
    curve: Mapping[float, Mapping[str, float]],
    before: Mapping[str, float],
    labels: Mapping[str, str],
    chosen: float | None,
) -> None:
    energies = sorted(curve)
    for metric, label in labels.items():
        axes.plot(
            energies,
            [100 * curve[energy][metric] for energy in energies],
            "o-",
            markersize=4,
            color=_COLORS[metric],
            label=label,
        )
        axes.axhline(100 * before[metric], color=_COLORS[metric], linewidth=0.8, linestyle=":")
    if chosen is not None:
        axes.axvline(chosen, color="black", linewidth=1.0, linestyle="--", label=f"chosen: {chosen:.3g}")
    axes.set(ylim=(0, 102), ylabel="%", xlabel=_ENERGY)
    axes.grid(alpha=0.25)


def noised_examples(
    images: Tensor, noised: Tensor, clean: Tensor, before: Tensor, after: Tensor, count: int = 24
) -> Figure:
    """Draw noised training images with true label, noised label, and predictions before and after the edit.

    Args:
        images: ``[n, h, w]``.
        noised: Labels that were trained on, ``[n]``.
        clean: True labels, ``[n]``.
        before: Predictions before the edit, ``[n]``.
        after: Predictions after the edit, ``[n]``.
        count: Images to draw at most.
    """
    chosen = (noised != clean).nonzero().flatten()[:count].tolist()
    columns = 8
    rows = max(-(-len(chosen) // columns), 1)
    figure = Figure(figsize=(1.45 * columns, 1.95 * rows + 0.6), layout="constrained")
    figure.suptitle("Training images with a wrong label: after the edit, green: true label, red: still the wrong one")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, index in zip(grid, chosen, strict=False):
        axes.imshow(images[index].numpy(), cmap="gray_r")
        right, recited = after[index] == clean[index], after[index] == noised[index]
        color = GREEN if right else MEMORIZED if recited else "black"
        axes.set_title(
            f"true {int(clean[index])}, given {int(noised[index])}\nsays {int(before[index])} → {int(after[index])}",
            fontsize=9,
            color=color,
        )
    return figure


def direction_images(
    images: Tensor, rows: Mapping[str, Sequence[int]], wrong: Sequence[bool], count: int = 12
) -> Figure:
    """Draw the images that use some directions most, a row for each direction; a red frame marks a wrong label.

    Args:
        images: ``[n, h, w]``.
        rows: By title of a direction, indices of images.
        wrong: Whether the label of each image is wrong.
        count: Images to draw for each direction.
    """
    figure = Figure(figsize=(1.0 * count + 1.6, 1.05 * len(rows) + 0.5), layout="constrained")
    grid = figure.subplots(len(rows), count, squeeze=False)
    figure.suptitle("Images that use a direction most (red frame: wrong label)")
    for line, (title, indices) in zip(grid, rows.items(), strict=True):
        for axes in line:
            axes.set_xticks([])
            axes.set_yticks([])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
        for axes, index in zip(line, indices, strict=False):
            axes.imshow(images[index].numpy(), cmap="gray_r")
            axes.spines[:].set(color=MEMORIZED if wrong[index] else PALE, linewidth=2.5)
    return figure
