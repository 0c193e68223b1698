"""Pictures of the analyses. Every function returns a matplotlib figure that belongs to no window."""

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_curvature.analysis.bands import LABELS, BandComparison
from lightning_curvature.analysis.curvature import Gathering
from lightning_curvature.analysis.detection import Detection
from lightning_curvature.analysis.directions import DirectionUse
from lightning_curvature.analysis.interplay import Interplay
from lightning_curvature.analysis.order import CurvatureOrder
from lightning_curvature.analysis.skills import SkillRetention

_KINDS = ("#c0392b", "#7f8c8d")


def bands(comparisons: Sequence[BandComparison]) -> Figure:
    """Draw the strength of memorized over clean examples in each band of the spectrum, one panel for each layer.

    Args:
        comparisons: As :func:`lightning_curvature.analysis.compare_bands` returns them, of one or more layers.
    """
    layers = list(dict.fromkeys(one.layer for one in comparisons))
    columns = min(len(layers), 3)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(1.2 + 3.9 * columns, 8.0), 0.9 + 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    styles = {("curvature", False): ("#c0392b", "o-"), ("curvature", True): ("#c0392b", "o--"),
              ("svd", False): ("#7f8c8d", "s-"), ("svd", True): ("#7f8c8d", "s--")}  # fmt: skip
    places = np.arange(len(LABELS))
    for axes in grid.flatten()[len(layers) :]:
        axes.set_axis_off()
    for axes, layer in zip(grid.flatten(), layers, strict=False):
        for one in (one for one in comparisons if one.layer == layer):
            color, line = styles[one.basis, one.normalized]
            label = f"{one.basis}, unit vectors" if one.normalized else one.basis
            axes.plot(places, one.ratio, line, color=color, label=label, markersize=4)
            axes.fill_between(places, one.low, one.high, color=color, alpha=0.12, linewidth=0)
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks(places, LABELS, fontsize=8)
        axes.set_title(layer, fontsize=9)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.25)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle("Activation strength, memorized over clean examples (shaded: 95 % bootstrap)")
    return figure


def detection(found: Detection) -> Figure:
    """Draw how well each score tells memorized examples from others, and the distributions of the best one.

    Args:
        found: As :func:`lightning_curvature.analysis.detect` returns it.
    """
    names = sorted(found.auroc, key=lambda name: found.auroc[name])
    figure = Figure(figsize=(11.0, 0.9 + max(0.28 * len(names), 2.4)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.barh(names, [found.auroc[name] for name in names], color="#2471a3")
    for place, name in enumerate(names):
        left.text(found.auroc[name], place, f" {found.auroc[name]:.3f}", va="center", fontsize=8)
    left.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    left.set(xlim=(0, 1.12), xlabel="AUROC (dotted: chance)")
    left.tick_params(labelsize=8)
    best = names[-1]
    scores = found.memorized[best], found.other[best]
    edges = np.histogram_bin_edges(np.concatenate(scores), 25)
    for values, color, label in zip(scores, _KINDS, ("memorized", "other"), strict=True):
        right.hist(values, edges, color=color, alpha=0.6, label=label)
    right.set(xlabel=best, ylabel="examples")
    right.legend(frameon=False)
    figure.suptitle("Telling memorized examples from others without labels")
    return figure


def direction_precision(uses: Sequence[DirectionUse]) -> Figure:
    """Draw the share of memorized ones among the examples that use each direction most.

    Args:
        uses: As :func:`lightning_curvature.analysis.direction_use` returns them, of sharp and of flat directions.
    """
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes: Axes = figure.subplots()
    for one in uses:
        color, label = (_KINDS[0], "flattest") if one.flat else ("#2471a3", "sharpest")
        axes.plot(range(1, len(one.precision) + 1), sorted(one.precision, reverse=True), "o-", color=color,
                  markersize=4, label=f"{label} directions, mean {one.mean_precision:.2f}")  # fmt: skip
    axes.axhline(uses[0].chance, color="black", linewidth=0.8, linestyle=":", label=f"chance {uses[0].chance:.2f}")
    axes.set(ylim=(-0.03, 1.03), xlabel="directions, by precision", ylabel=f"precision at {len(uses[0].top[0])}",
             title=f"Are the examples that use a direction most the memorized ones? {uses[0].layer}")  # fmt: skip
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def interplay_bars(found: Interplay, measure: str) -> Figure:
    """Draw what edits of groups of layers do to one measure, alone and together.

    Args:
        found: As :func:`lightning_curvature.analysis.interplay` returns it.
        measure: Name of the measure.
    """
    changes = {name: own[measure] - found.before[measure] for name, own in found.alone.items()}
    together = found.together[measure] - found.before[measure]
    names = [*changes, "sum of these", "together"]
    figure = Figure(figsize=(7.0, 0.9 + 0.34 * len(names)), layout="constrained")
    axes: Axes = figure.subplots()
    colors = ["#7f8c8d"] * len(changes) + ["#2471a3", "#c0392b"]
    axes.barh(names, [*changes.values(), sum(changes.values()), together], color=colors)
    axes.invert_yaxis()
    axes.set(xlabel=f"change of {measure}")
    return figure


def gathering(found: Gathering) -> Figure:
    """Draw the curvature along single examples' sharpest directions, in averages over more and more examples.

    Args:
        found: As :func:`lightning_curvature.analysis.gather` returns it.
    """
    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    axes: Axes = figure.subplots()
    for curves, median, color, label in zip(
        (found.memorized, found.clean), found.medians(), _KINDS, ("memorized", "clean"), strict=True
    ):
        for curve in curves:
            axes.plot(found.sizes, curve, color=color, alpha=0.15, linewidth=0.8)
        axes.plot(found.sizes, median, "o-", color=color, label=f"{label}, median of {len(curves)}")
    if found.crossing is not None:
        axes.axvline(found.crossing, color="black", linestyle="--", linewidth=1.0, label=f"crossing: {found.crossing}")
    axes.set(xscale="log", yscale="log", xlabel="examples averaged, the example itself among them",
             ylabel="curvature along its sharpest direction", title="Sharp alone, flat in a population?")  # fmt: skip
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure


def curvature_order(found: CurvatureOrder) -> Figure:
    """Draw measured against predicted curvature of directions over the whole spectrum.

    Args:
        found: As :func:`lightning_curvature.analysis.curvature_order` returns it.
    """
    scores = list(found.predicted)
    figure = Figure(figsize=(1.0 + 4.2 * len(scores), 4.2), layout="constrained")
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    for axes, score in zip(panels, scores, strict=True):
        for name, color in (("ggn", "#2471a3"), ("hessian", "#c0392b")):
            measured = np.abs(getattr(found, name))
            label = f"|{name}|, rank correlation {found.correlation(score, name):.2f}"
            axes.plot(found.predicted[score], measured, ".", color=color, alpha=0.6, label=label)
        axes.set(xscale="log", yscale="log", xlabel=f"predicted: {score}")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("measured curvature")
    figure.suptitle(f"Curvature of directions of {found.layer}", fontsize=10)
    return figure


def skill_retention(found: SkillRetention) -> Figure:
    """Draw what edits leave of each skill, against the energy that they keep and against what they cost.

    Args:
        found: As :func:`lightning_curvature.analysis.skill_retention` returns it.
    """
    figure = Figure(figsize=(11.0, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for skill, marker in zip(found.accuracy, itertools.cycle("os^vD<>p"), strict=False):
        for axes, places in ((left, found.energies), (right, found.perplexity)):
            axes.plot(places, found.retained(skill), f"{marker}-", markersize=4, label=skill)
    left.set(xlabel="energy", ylabel="retained share (0: chance)")
    left.invert_xaxis()
    right.set(xlabel="perplexity of ordinary text, times that before", xscale="log")
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter("{x:g}")
    for axes in (left, right):
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.grid(alpha=0.25)
    right.legend(frameon=False)
    figure.suptitle("What edits leave of each skill")
    return figure
