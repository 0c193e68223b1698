"""Sections of a page on the curvature: spectra of the factors, and what the analyses say about them."""

from collections.abc import Iterator

from lightning_curvature.analysis.bands import LABELS, draw_bands
from lightning_curvature.analysis.directions import draw_precision
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.report import plots
from lightning_curvature.report.blocks import Block, details, paragraph, picture, png, table
from lightning_curvature.report.run import RunFolder

SHOWN_LAYERS = 2
"""Layers whose spectra are shown at once, the last ones; the others open with a click."""
MOST_LAYERS = 24
"""Layers whose spectrum is drawn: a picture of a wide layer takes seconds, and a page of hundreds is not read."""
SHOWN_DIRECTIONS = 3
SHOWN_WINDOWS = 5
UNEDITED_ENERGY = 0.9
"""Energy at which the staircase is drawn in the spectrum of a layer that was not edited at an energy of its own."""


def spectra(run: RunFolder) -> Iterator[Block]:
    """Yield the joint spectrum of each layer, for each factor file."""
    for path in run.factor_files:
        pictures, factors = [], KroneckerFactors.open(path)
        for name in list(factors)[-MOST_LAYERS:]:
            layer, edit = factors[name], run.report.get("layers", {}).get(name, {})
            energy = edit.get("energy") or UNEDITED_ENERGY
            caption = (
                f"Curvature of the directions u_i v_j^T of {name}; the line bounds the pairs that energy {energy:.3g} "
                "keeps."
            )
            pictures.append(picture(plots.spectrum(layer, energy, name), caption))
        last = f" The last {MOST_LAYERS} of {len(factors)} layers are shown." if len(factors) > MOST_LAYERS else ""
        yield paragraph(f"From {path.name}.{last}")
        yield from pictures[-SHOWN_LAYERS:]
        if len(pictures) > SHOWN_LAYERS:
            yield details(f"{len(pictures) - SHOWN_LAYERS} more layers", pictures[:-SHOWN_LAYERS])


def bands(analyses: Analyses) -> Iterator[Block]:
    """Yield how strongly memorized examples use the bands of each layer's spectrum."""
    if not analyses.bands:
        return
    curvature = [
        comparison for comparison in analyses.bands if comparison.basis == "curvature" and not comparison.normalized
    ]
    num_rising = sum(comparison.rising for comparison in curvature)
    num_crossing = sum(comparison.crosses_one for comparison in curvature)
    yield paragraph(
        "Where memorized examples answer more strongly than clean ones: mean norm of the part of a layer's output that "
        "comes from each band of its weight, memorized over clean (arXiv:2510.24256, section 4). "
        f"The ratio rises from each band to the next flatter one in {num_rising} of {len(curvature)} layers, and is "
        f"below 1 in the top band and above 1 in the bottom one in {num_crossing}."
    )
    for comparison in curvature:
        if not comparison.rising:
            ratios = ", ".join(f"{label} {ratio:.2f}" for label, ratio in zip(LABELS, comparison.ratio, strict=True))
            yield paragraph(f"It does not rise in {comparison.layer}: {ratios}.")
    caption = "In the curvature basis and in the SVD basis, with and without scaling each vector to unit norm."
    yield picture(draw_bands(analyses.bands), caption)
    rows = [
        [
            comparison.layer,
            comparison.basis,
            "yes" if comparison.normalized else "no",
            *(
                f"{ratio:.2f} ({low:.2f} to {high:.2f})"
                for ratio, low, high in zip(comparison.ratio, comparison.low, comparison.high, strict=True)
            ),
        ]
        for comparison in analyses.bands
    ]
    headers = ["layer", "basis", "unit vectors", *LABELS]
    yield details("As numbers", [table(headers, rows, "Ratio, with its 95 % bootstrap interval over examples.")])


def detection(analyses: Analyses) -> Iterator[Block]:
    """Yield how well scores tell memorized examples from others."""
    for others, scores in analyses.detection.items():
        yield paragraph(
            f"Memorized examples against {others}, by scores from one forward pass; 0.5 is chance, and an area below "
            "it means that low scores tell."
        )
        yield picture(scores.plot(), "Area under the ROC curve of each score; right: the best one.")


def directions(run: RunFolder) -> Iterator[Block]:
    """Yield which examples use the sharpest and the flattest directions of a layer most."""
    uses = run.analyses.directions
    if not uses:
        return
    means = "; ".join(
        f"{'flattest' if use.flat else 'sharpest'} {len(use.directions)} directions {use.mean_precision:.2f}"
        for use in uses
    )
    yield paragraph(
        f"Share of memorized ones among the {len(uses[0].top[0])} examples that use a direction most, {means}; by "
        f"chance {uses[0].chance:.2f}."
    )
    yield picture(draw_precision(uses), "Precision of each direction.")
    if (run.folder / "directions.png").exists():
        yield png(run.folder / "directions.png", "The images that use the flattest and the sharpest directions most.")
    windows = run.analyses.windows
    for use in uses if windows else ():
        for place, top, precision in [*zip(use.directions, use.top, use.precision, strict=True)][-SHOWN_DIRECTIONS:]:
            rows = [[f"{rank}.", windows[index]] for rank, index in enumerate(top[:SHOWN_WINDOWS], 1)]
            kind = "flat" if use.flat else "sharp"
            yield details(
                f"Direction {place}, {kind}: {precision:.2f} of its examples are memorized",
                [table(["", "window"], rows, "Windows that use it most.")],
            )
