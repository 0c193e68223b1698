r"""How strongly examples use the bands of a layer's spectrum.

A weight is cut into bands: the top 10 % of its components, 10 to 25 %, 25 to 50 %, and the bottom 50 %. In the
curvature basis the components are the pairs :math:`u_i v_j^\top`, ordered by their curvature
:math:`\lambda_i \mu_j`; in the SVD they are the pairs of singular vectors, ordered by singular value. An input ``a``
uses a band as strongly as the band's part of the weight answers to it: :math:`\lVert W_b a \rVert`.

Source: arXiv:2510.24256, section 4 and figure 2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_curvature._checks import check_option
from lightning_curvature.analysis.inputs import check_activations
from lightning_curvature.analysis.style import CLEAN, MEMORIZED
from lightning_curvature.factors.basis import coefficients
from lightning_curvature.factors.layer import LayerFactors

BANDS = (0.1, 0.25, 0.5, 1.0)
"""Upper ends of the bands, as shares of all components in the order of falling curvature."""
BASES = ("curvature", "svd")
LABELS = ("top 10 %", "10 to 25 %", "25 to 50 %", "bottom 50 %")


@dataclass(frozen=True)
class BandComparison:
    """Strength of memorized over clean examples in each band of :data:`BANDS`, the sharpest band first.

    Args:
        layer: Name of the layer.
        basis: ``"curvature"`` or ``"svd"``.
        normalized: Whether each activation vector was scaled to unit norm first.
        ratio: Mean strength of memorized examples over that of clean ones.
        low: Lower end of the 95 % bootstrap interval over examples.
        high: Its upper end.
    """

    layer: str
    basis: str
    normalized: bool
    ratio: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def rising(self) -> bool:
        """Whether the ratio rises from each band to the next flatter band."""
        return all(sharper < flatter for sharper, flatter in pairwise(self.ratio))

    @property
    def crosses_one(self) -> bool:
        """Whether the ratio is below 1 in the sharpest band and above 1 in the flattest."""
        return self.ratio[0] < 1 < self.ratio[-1]

    def plot(self) -> Any:
        """Return a figure of this comparison alone."""
        return draw_bands([self])


def band_strengths(
    weight: Tensor, factors: LayerFactors, inputs: Tensor, basis: str = "curvature", normalize: bool = False
) -> Tensor:
    """Return how strongly each example uses each band, ``[examples, bands]``, float64.

    Args:
        weight: The layer's weight, ``[d_out, d_in]``.
        factors: Its factors, whose basis is used for ``basis="curvature"``.
        inputs: Its inputs, ``[examples, positions, d_in]``; strengths are averaged over positions.
        basis: ``"curvature"`` or ``"svd"``.
        normalize: Scale each vector to unit norm first, so that norms alone cannot explain a difference.

    Raises:
        ValueError: If a shape does not fit.
    """
    check_option(basis, BASES, "basis")
    if tuple(weight.shape) != factors.shape:
        raise ValueError(f"The factors are for a weight {list(factors.shape)}, found {list(weight.shape)}.")
    rows = check_activations(inputs, weight.shape[1], "band_strengths")
    if normalize:
        rows = torch.nn.functional.normalize(rows, dim=2)
    strengths = _curvature(weight, factors, rows) if basis == "curvature" else _svd(weight, rows)
    return torch.stack(strengths, -1).mean(1)


def _curvature(weight: Tensor, factors: LayerFactors, rows: Tensor) -> list[Tensor]:
    curvature = factors.basis
    mass = torch.outer(curvature.lam, curvature.mu).flatten()
    rank = torch.empty_like(mass, dtype=torch.int64)
    rank[mass.argsort(descending=True)] = torch.arange(len(mass), device=mass.device)
    within = rank.view(factors.shape).double() / len(mass)
    C, rotated = coefficients(weight, curvature), rows.to(curvature.U_A) @ curvature.U_A
    return [
        (rotated @ (C * ((within >= start) & (within < end))).T).norm(dim=2) for start, end in pairwise((0.0, *BANDS))
    ]


def _svd(weight: Tensor, rows: Tensor) -> list[Tensor]:
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    answers = rows.to(right) @ right.T * values
    ends = [round(end * len(values)) for end in (0.0, *BANDS)]
    return [answers[..., start:end].norm(dim=2) for start, end in pairwise(ends)]


def compare_bands(
    layer: str,
    weight: Tensor,
    factors: LayerFactors,
    memorized: Tensor,
    clean: Tensor,
    basis: str = "curvature",
    normalize: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> BandComparison:
    """Compare how strongly memorized and clean examples use the bands of a layer.

    Args:
        layer: Name of the layer.
        weight: Its weight, ``[d_out, d_in]``.
        factors: Its factors.
        memorized: Its inputs on memorized examples, ``[n, positions, d_in]``.
        clean: Its inputs on examples that are not memorized, likewise.
        basis: ``"curvature"`` or ``"svd"``.
        normalize: As in :func:`band_strengths`.
        resamples: Bootstrap samples of the examples of each kind.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If a shape does not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    groups = [band_strengths(weight, factors, rows, basis, normalize).cpu() for rows in (memorized, clean)]
    means = [group.mean(0) for group in groups]
    samples = [
        group[torch.randint(len(group), (resamples, len(group)), generator=generator)].mean(1) for group in groups
    ]
    low, high = (samples[0] / samples[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    ratio = means[0] / means[1]
    return BandComparison(layer, basis, normalize, *(tuple(values.tolist()) for values in (ratio, low, high)))


def all_rising(comparisons: Sequence[BandComparison]) -> bool:
    """Tell whether all comparisons in the curvature basis rise towards the flat bands, and cross 1 on the way."""
    curvature = [comparison for comparison in comparisons if comparison.basis == "curvature"]
    return all(comparison.rising and comparison.crosses_one for comparison in curvature)


def draw_bands(comparisons: Sequence[BandComparison]) -> Any:
    """Draw the strength of memorized over clean examples in each band of the spectrum, one panel for each layer.

    Args:
        comparisons: As :func:`compare_bands` returns them, of one or more layers.
    """
    import numpy as np
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(comparison.layer for comparison in comparisons))
    columns = min(len(layers), 3)
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(max(1.2 + 3.9 * columns, 8.0), 0.9 + 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    styles = {
        ("curvature", False): (MEMORIZED, "o-"),
        ("curvature", True): (MEMORIZED, "o--"),
        ("svd", False): (CLEAN, "s-"),
        ("svd", True): (CLEAN, "s--"),
    }
    places = np.arange(len(LABELS))
    for axes in grid.flatten()[len(layers) :]:
        axes.set_axis_off()
    for axes, layer in zip(grid.flatten(), layers, strict=False):
        for shown in (comparison for comparison in comparisons if comparison.layer == layer):
            color, line = styles[shown.basis, shown.normalized]
            label = f"{shown.basis}, unit vectors" if shown.normalized else shown.basis
            axes.plot(places, shown.ratio, line, color=color, label=label, markersize=4)
            axes.fill_between(places, shown.low, shown.high, color=color, alpha=0.12, linewidth=0)
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
