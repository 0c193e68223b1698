"""One HTML page of a run, which opens without a network: everything is inside it, pictures as SVG."""

import json
from collections.abc import Iterator
from pathlib import Path

import jinja2

from lightning_curvature._version import __version__
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.report.blocks import Block, details, paragraph, table
from lightning_curvature.report.curvature_sections import bands, detection, directions, spectra
from lightning_curvature.report.edit_sections import changed, choice, edited_layers, energy_curve, examples, outcome
from lightning_curvature.report.run import RunFolder, read_run
from lightning_curvature.storage.atomic import replacing

PAGE = "report.html"


def write_page(folder: Path) -> Path:
    """Write ``report.html`` into the folder of a run, from the files in it.

    It shows what is there of ``report.json`` and ``analysis.json`` of a demo, factor files, and edited checkpoints.

    Args:
        folder: The folder.

    Returns:
        Path of the page.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing of a run is in it.
        ValueError: If a file does not hold what its name says.
    """
    run = read_run(folder)
    sections = [
        ("outcome", "What the edit did", outcome(run.report)),
        ("choice", "How the callback chose its edit", choice(run.report)),
        ("changed", "Answers that changed", changed(run.report)),
        ("layers", "What was edited", edited_layers(run.report)),
        ("energy", "Energy", energy_curve(run.report)),
        ("examples", "Examples, before and after", examples(run)),
        ("spectra", "Spectra", spectra(run)),
        ("bands", "Bands of the spectrum", bands(run.analyses)),
        ("detection", "Telling memorized examples without labels", detection(run.analyses)),
        ("directions", "What flat directions hold", directions(run)),
        ("provenance", "Provenance", _provenance(run)),
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


def _provenance(run: RunFolder) -> Iterator[Block]:
    """Yield where the factors and the edited checkpoints come from, and the settings of the run."""
    for path in run.factor_files:
        factors = KroneckerFactors.open(path)
        facts = {"SHA-256": factors.digest(), **factors.provenance}
        yield table(["", ""], [[key, str(value)] for key, value in facts.items()], f"Factors {path.name}")
    for checkpoint in run.edited:
        yield details(
            f"Edited checkpoint {Path(checkpoint['path']).name}",
            [{"kind": "code", "text": json.dumps(checkpoint["edit"], indent=2)}],
        )
    for reason in run.unread:
        yield paragraph(f"Not read: {reason}")
    for title in ("settings", "seconds", "versions"):
        if title in run.report:
            rows = [
                [key, f"{value:.4g}" if isinstance(value, float) else str(value)]
                for key, value in run.report[title].items()
            ]
            yield table(["", ""], rows, title.capitalize())
