"""Sections of a page on the edit: what it did, to which layers, at which energy. They read ``report.json``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_curvature.baselines.methods import METHOD_LABELS
from lightning_curvature.report import edit_plots, plots
from lightning_curvature.report.blocks import Block, details, paragraph, picture, png, table
from lightning_curvature.report.run import Report, RunFolder

SHOWN_CONTINUATIONS = 3
"""Continuations of each kind of text that are shown at once; the rest opens with a click."""
_NOT_RATES = ("perplexity", "domain_perplexity", "min_k")


def outcome(report: Report) -> Iterator[Block]:
    """Yield the metrics before and after the edit, beside those of the controls."""
    if not report:
        return
    before, after = report["before"], report["after"]
    rows = {"before": before, "after": after}
    if "default" in report:
        default = report["default"]
        rows = {"before": before, "after, as KFACEditCallback() edits": default, "after": after}
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
    methods = {METHOD_LABELS.get(name, name): row for name, row in report.get("methods", {}).items()}
    if len(methods) > 1:
        columns = [name for name in names if all(name in row for row in methods.values())]
        yield _metrics(methods, columns, "The edit beside controls, each chosen by the same rule on other data.", 0)


def _metrics(rows: Mapping[str, Mapping[str, Any]], names: Sequence[str], caption: str, strong: int) -> Block:
    body = [
        [
            title,
            f"{row['energy']:.3g}" if "energy" in row else "",
            *(f"{row[name]:.2f}" if name in _NOT_RATES else f"{100 * row[name]:.1f}" for name in names),
        ]
        for title, row in rows.items()
    ]
    return table(["", "energy", *(name.replace("_", " ") for name in names)], body, caption, [strong])


def edited_layers(report: Report) -> Iterator[Block]:
    """Yield what the edit kept of each layer."""
    edits = report.get("layers")
    if not edits:
        return
    headers = ["layer", "energy", "reached", "kept", "of", "share kept", "relative change", "predicted loss"]
    yield table(
        [*headers, "positions", "not counted"],
        [
            [
                name,
                f"{edit['energy']:.3g}" if edit["energy"] is not None else "",
                f"{edit['energy_kept']:.4f}",
                f"{edit['kept']:,}",
                f"{edit['total']:,}",
                f"{edit['kept'] / edit['total']:.2%}",
                f"{edit['relative_change']:.3f}",
                f"{edit['predicted_loss']:.2g}" if edit.get("predicted_loss") is not None else "",
                f"{edit['num_inputs']:,}",
                f"{edit['dropped']:.1%}",
            ]
            for name, edit in edits.items()
        ],
        "Kept: coefficients of the weight in the curvature basis. Relative change: ||W' - W|| / ||W||. "
        "Predicted loss: how much the loss rises, in nats per loss position, to second order.",
    )
    yield picture(edit_plots.layer_map(edits), "How much of each edited layer is kept, and how far it moves.")


def choice(report: Report) -> Iterator[Block]:
    """Yield what the callback has measured to choose its edit, and how far each layer moves under it."""
    found = report.get("choice")
    if not found or not found["rows"]:
        return
    yield paragraph(found["text"])
    figure = edit_plots.choice_curves(found["rows"], found["name"], found["budget"])
    yield picture(figure, "Each point is one edit, measured on training and on validation batches; no label is known.")
    if report.get("moved"):
        yield picture(edit_plots.layer_map(report["moved"]), "How far each layer moves under the edit of the callback.")


def changed(report: Report) -> Iterator[Block]:
    """Yield by class how answers on training images have changed under the edit of the callback."""
    rows = report.get("changed")
    if not rows:
        return
    total = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
    yield paragraph(
        f"Of {total['wrong']} images with a wrong label the model repeats {total['recited']} before and "
        f"{total['still']} after the edit of the callback; {total['recovered']} get their true label. Of "
        f"{total['right']} images with a right label {total['lost']} are lost."
    )
    headers = ["true class", "wrong label", "repeated before", "after", "recovered", "right label", "lost"]
    body = [[name, *(str(count) for count in row.values())] for name, row in {**rows, "all": total}.items()]
    yield table(headers, body, "Training images whose answer changed, by class.", [len(body) - 1])


def energy_curve(report: Report) -> Iterator[Block]:
    """Yield the metrics against the energy."""
    curve = report.get("curve") or report.get("curves", {}).get("report", {}).get("kfac")
    if not curve:
        return
    points = {float(energy): metrics for energy, metrics in curve.items()}
    draw = plots.recitation_curves if "strict" in report["before"] else plots.energy_curves
    figure = draw(points, report["before"], report.get("settings", {}).get("energy"))
    yield picture(figure, "Each point is one edit of the same model; the dashed line is the energy that was chosen.")


def examples(run: RunFolder) -> Iterator[Block]:
    """Yield what the model says before and after the edit: predictions of images, or continuations of text."""
    if (run.folder / "examples.png").exists():
        yield png(run.folder / "examples.png", "Training images with a wrong label, before and after the edit.")
    for title, continuations in run.report.get("continuations", {}).items():
        yield paragraph(f"{title} text. Red: recited exactly; green: no longer.")
        blocks = [{"kind": "continuation", **continuation} for continuation in continuations]
        yield from blocks[:SHOWN_CONTINUATIONS]
        if len(blocks) > SHOWN_CONTINUATIONS:
            yield details(f"{len(blocks) - SHOWN_CONTINUATIONS} more", blocks[SHOWN_CONTINUATIONS:])
