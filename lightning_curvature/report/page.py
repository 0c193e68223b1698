"""One HTML page of a run, which opens without a network: everything is inside it, pictures as SVG."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from lightning_curvature._version import __version__
from lightning_curvature.analysis.bands import LABELS, draw_bands
from lightning_curvature.analysis.directions import draw_precision
from lightning_curvature.analysis.files import FILE, Analyses
from lightning_curvature.baselines.methods import METHOD_LABELS
from lightning_curvature.factors.files import is_factor_file
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.report import plots
from lightning_curvature.report.blocks import Block, details, paragraph, picture, png, table
from lightning_curvature.report.inspection import describe
from lightning_curvature.storage.atomic import replacing

PAGE = "report.html"
MANY = 2
"""Layers whose pictures are shown at once; those of the others open with a click."""
SHOWN_DIRECTIONS = 3
SHOWN_WINDOWS = 5

Report = Mapping[str, Any]


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, from the files in it.

    It shows what it finds: ``report.json`` and ``analysis.json`` of a demo, factor files, and edited checkpoints.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing of a run is in it.
        ValueError: If a file does not hold what its name says.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Name the folder that a run wrote to.")
    report = _read_report(folder / "report.json")
    factor_files = [path for path in sorted(folder.glob("*.safetensors")) if is_factor_file(path)]
    distinct = {KroneckerFactors.open(path).digest(): path for path in reversed(factor_files)}
    edited, unread = [], []
    for path in sorted([*folder.glob("*.ckpt"), *(set(folder.glob("*.safetensors")) - set(factor_files))]):
        try:
            found = describe(path)
        except ValueError as error:  # it may need classes that nobody allowed, and the rest can be shown without it
            unread.append(str(error))
        else:
            edited += [found] if found.get("edit") else []
    if not (report or factor_files or edited):
        raise FileNotFoundError(
            f"{folder} holds no report.json, no factors (*.safetensors) and no edited checkpoint (*.ckpt): nothing to "
            "show. Name the folder that a run wrote to."
        )
    analyses = Analyses.load(folder) if (folder / FILE).exists() else Analyses()
    sections = [
        ("outcome", "What the edit did", _outcome(report)),
        ("layers", "What was edited", _layers(report)),
        ("energy", "Energy", _energy(report)),
        ("examples", "Examples, before and after", _examples(folder, report)),
        ("spectra", "Spectra", _spectra([*distinct.values()], report)),
        ("bands", "Bands of the spectrum", _bands(analyses)),
        ("detection", "Telling memorized examples without labels", _detection(analyses)),
        ("directions", "What flat directions hold", _directions(folder, analyses)),
        ("provenance", "Provenance", _provenance([*distinct.values()], edited, unread, report)),
    ]
    shown = [{"id": key, "title": title, "blocks": list(blocks)} for key, title, blocks in sections]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lightning_curvature.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("run.html.j2").render(
        title=f"Curvature edit of {folder.resolve().name}",
        subtitle=f"lightning_curvature {__version__}; method: arXiv:2510.24256",
        sections=[section for section in shown if section["blocks"]],
    )
    target = folder / PAGE
    with replacing(target) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return target


def _read_report(path: Path) -> Report:
    if not path.exists():
        return {}
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
        found = isinstance(report["before"], dict) and isinstance(report["after"], dict)
    except (ValueError, KeyError, TypeError):
        found = False
    if not found:
        raise ValueError(f"{path}: not the report of a run; expected an object with before and after.")
    return report


# Sections ----------------------------------------------------------------------------------------------------------


def _outcome(report: Report) -> Iterator[Block]:
    if not report:
        return
    before, after = report["before"], report["after"]
    rows = {"before": before, "after": after}
    if "default" in report:
        rows = {
            "before": before,
            f"after, default energy {report['default']['energy']:g}": report["default"],
            "after": after,
        }
    names = [name for name in before if all(name in row for row in rows.values())]
    if {"strict", "perplexity"} <= set(names):
        yield paragraph(
            f"The model recites {before['strict']:.1%} of the memorized sequences exactly before the edit and "
            f"{after['strict']:.1%} after it; perplexity of clean text is "
            f"{after['perplexity'] / before['perplexity']:.3f} times what it was."
        )
    if {"memorized", "val_accuracy"} <= set(names):
        yield paragraph(
            f"The model repeats {before['memorized']:.1%} of the wrong training labels before the edit and "
            f"{after['memorized']:.1%} after it; validation accuracy goes from {before['val_accuracy']:.1%} to "
            f"{after['val_accuracy']:.1%}."
        )
    if "counts" in report:
        counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report["counts"].items())
        yield paragraph(f"Measured on: {counts}.")
    yield _metrics(rows, names, "Rates in %; perplexity and log-probability (min_k) as they are.", strong=len(rows) - 1)
    controls = {METHOD_LABELS.get(name, name): row for name, row in report.get("methods", {}).items()}
    if len(controls) > 1:
        columns = [name for name in names if all(name in row for row in controls.values())]
        yield _metrics(controls, columns, "The edit beside controls, each chosen by the same rule on other data.", 0)


def _layers(report: Report) -> Iterator[Block]:
    if not report.get("layers"):
        return
    edits = report["layers"]
    headers = ["layer", "energy", "reached", "kept", "of", "share kept", "relative change", "positions", "not counted"]
    yield table(
        headers,
        [
            [
                name,
                f"{e['energy']:.3g}",
                f"{e['energy_kept']:.4f}",
                f"{e['kept']:,}",
                f"{e['total']:,}",
                f"{e['kept'] / e['total']:.2%}",
                f"{e['relative_change']:.3f}",
                f"{e['num_inputs']:,}",
                f"{e['dropped']:.1%}",
            ]
            for name, e in edits.items()
        ],
        "Kept: coefficients of the weight in the curvature basis. Relative change: ||W' - W|| / ||W||.",
    )
    yield picture(plots.layer_map(edits), "How much of each edited layer is kept, and how far it moves.")


def _energy(report: Report) -> Iterator[Block]:
    curve = report.get("curve") or report.get("curves", {}).get("report", {}).get("kfac")
    if not curve:
        return
    points = {float(energy): metrics for energy, metrics in curve.items()}
    draw = plots.recitation_curves if "strict" in report["before"] else plots.energy_curves
    figure = draw(points, report["before"], report.get("settings", {}).get("energy"))
    yield picture(figure, "Each point is one edit of the same model; the dashed line is the energy that was chosen.")


def _examples(folder: Path, report: Report) -> Iterator[Block]:
    if (folder / "examples.png").exists():
        yield png(folder / "examples.png", "Training images with a wrong label, before and after the edit.")
    for title, shown in report.get("continuations", {}).items():
        yield paragraph(f"{title} text. Red: recited exactly; green: no longer.")
        blocks = [{"kind": "continuation", **one} for one in shown]
        yield from blocks[:SHOWN_DIRECTIONS]
        if len(blocks) > SHOWN_DIRECTIONS:
            yield details(f"{len(blocks) - SHOWN_DIRECTIONS} more", blocks[SHOWN_DIRECTIONS:])


def _spectra(factor_files: Sequence[Path], report: Report) -> Iterator[Block]:
    for path in factor_files:
        pictures = []
        for name, layer in KroneckerFactors.open(path).items():
            edit = report.get("layers", {}).get(name)
            energy = edit["energy"] if edit else 0.9
            pictures.append(
                picture(
                    plots.spectrum(layer, energy, name),
                    (
                        f"Curvature of the directions u_i v_j^T of {name}; the line bounds the pairs that energy {energy:.3g} "
                        "keeps."
                    ),
                )
            )
        yield paragraph(f"From {path.name}.")
        yield from pictures[-MANY:]
        if len(pictures) > MANY:
            yield details(f"{len(pictures) - MANY} more layers", pictures[:-MANY])


def _bands(analyses: Analyses) -> Iterator[Block]:
    if not analyses.bands:
        return
    curvature = [one for one in analyses.bands if one.basis == "curvature" and not one.normalized]
    crossing = [one for one in curvature if one.ratio[0] < 1 < one.ratio[-1]]
    yield paragraph(
        "Where memorized examples answer more strongly than clean ones: mean norm of the part of a layer's output that "
        "comes from each band of its weight, memorized over clean (arXiv:2510.24256, section 4). "
        f"The ratio rises from each band to the next flatter one in {sum(one.rising for one in curvature)} of "
        f"{len(curvature)} layers, and is below 1 in the top band and above 1 in the bottom one in {len(crossing)}."
    )
    for one in curvature:
        if not one.rising:
            ratios = ", ".join(f"{label} {ratio:.2f}" for label, ratio in zip(LABELS, one.ratio, strict=True))
            yield paragraph(f"It does not rise in {one.layer}: {ratios}.")
    caption = "In the curvature basis and in the SVD basis, with and without scaling each vector to unit norm."
    yield picture(draw_bands(analyses.bands), caption)
    rows = [
        [
            one.layer,
            one.basis,
            "yes" if one.normalized else "no",
            *(f"{r:.2f} ({low:.2f} to {high:.2f})" for r, low, high in zip(one.ratio, one.low, one.high, strict=True)),
        ]
        for one in analyses.bands
    ]
    headers = ["layer", "basis", "unit vectors", *LABELS]
    yield details("As numbers", [table(headers, rows, "Ratio, with its 95 % bootstrap interval over examples.")])


def _detection(analyses: Analyses) -> Iterator[Block]:
    for against, found in analyses.detection.items():
        yield paragraph(
            f"Memorized examples against {against}, by scores from one forward pass; 0.5 is chance, and an area below "
            "it means that low scores tell."
        )
        yield picture(found.plot(), "Area under the ROC curve of each score; right: the best one.")


def _directions(folder: Path, analyses: Analyses) -> Iterator[Block]:
    if not analyses.directions:
        return
    count = len(analyses.directions[0].top[0])
    means = "; ".join(
        f"{'flattest' if one.flat else 'sharpest'} {len(one.directions)} directions {one.mean_precision:.2f}"
        for one in analyses.directions
    )
    yield paragraph(
        f"Share of memorized ones among the {count} examples that use a direction most, {means}; by chance "
        f"{analyses.directions[0].chance:.2f}."
    )
    yield picture(draw_precision(analyses.directions), "Precision of each direction.")
    if (folder / "directions.png").exists():
        yield png(folder / "directions.png", "The images that use the flattest and the sharpest directions most.")
    for one in analyses.directions if analyses.windows else ():
        for place, top, precision in [*zip(one.directions, one.top, one.precision, strict=True)][-SHOWN_DIRECTIONS:]:
            rows = [[f"{rank}.", analyses.windows[index]] for rank, index in enumerate(top[:SHOWN_WINDOWS], 1)]
            kind = "flat" if one.flat else "sharp"
            yield details(
                f"Direction {place}, {kind}: {precision:.2f} of its examples are memorized",
                [table(["", "window"], rows, "Windows that use it most.")],
            )


def _provenance(
    factor_files: Sequence[Path], edited: Sequence[Mapping[str, Any]], unread: Sequence[str], report: Report
) -> Iterator[Block]:
    for path in factor_files:
        factors = KroneckerFactors.open(path)
        facts = {"SHA-256": factors.digest(), **factors.provenance}
        yield table(["", ""], [[key, str(value)] for key, value in facts.items()], f"Factors {path.name}")
    for found in edited:
        yield details(
            f"Edited checkpoint {Path(found['path']).name}",
            [{"kind": "code", "text": json.dumps(found["edit"], indent=2)}],
        )
    for reason in unread:
        yield paragraph(f"Not read: {reason}")
    for title in ("settings", "seconds", "versions"):
        if title in report:
            rows = [
                [key, f"{value:.4g}" if isinstance(value, float) else str(value)]
                for key, value in report[title].items()
            ]
            yield table(["", ""], rows, title.capitalize())


def _metrics(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], caption: str, strong: int) -> Block:
    plain = ("perplexity", "domain_perplexity", "min_k")
    body = [
        [
            title,
            f"{row['energy']:.3g}" if "energy" in row else "",
            *(f"{row[name]:.2f}" if name in plain else f"{100 * row[name]:.1f}" for name in names),
        ]
        for title, row in rows.items()
    ]
    return table(["", "energy", *(name.replace("_", " ") for name in names)], body, caption, [strong])
