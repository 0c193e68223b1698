"""Draws the picture of the README from the results of ``bench_pretrained.py``.

python benchmarks/draw_front.py
"""

import json
from pathlib import Path
from statistics import mean, stdev

from matplotlib import rc_context
from matplotlib.figure import Figure

from lightning_curvature.analysis.style import BLUE, MEMORIZED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pretrained-smollm2.json"
PICTURE = ROOT / "docs" / "figures" / "front.svg"
ROWS = {
    "fine-tuned": "fine-tuned",
    "interpolation with the start, within 1.05": "interpolation with the start,\nat 1.05 times the perplexity",
    "interpolation with the start, within 1": "interpolation with the start,\nat no cost",
    "KFACEditCallback()": "KFACEditCallback()",
}
KINDS = {"recited web": ("web text", MEMORIZED), "recited quotes": ("quotes", BLUE)}


def draw() -> Figure:
    """Return the picture: how much is recited, and at which perplexity of held-out text, over seeds."""
    runs = [
        [row for row in run if row["table"] == "methods"] for run in json.loads(RESULTS.read_text())["runs"].values()
    ]
    figure = Figure(figsize=(8.0, 3.1), layout="constrained")
    axes = figure.subplots()
    for place, (name, title) in enumerate(ROWS.items()):
        rows = [row for run in runs for row in run if row["row"] == name]
        for number, (kind, (label, color)) in enumerate(KINDS.items()):
            rates = [100 * row[kind] for row in rows]
            y = place + 0.2 * (2 * number - 1)
            axes.barh(y, mean(rates), 0.36, xerr=stdev(rates), color=color, label=label if place == 0 else None)
            axes.text(mean(rates) + stdev(rates) + 1, y, f"{mean(rates):.0f} %", va="center", fontsize=9)
        perplexity = mean(row["wiki"] for row in rows)
        axes.text(114, place, f"{perplexity:.1f}", va="center", ha="right", fontsize=10)
        axes.text(-1, place, title, va="center", ha="right", fontsize=10)
    axes.text(114, -0.85, "perplexity", va="center", ha="right", fontsize=9)
    axes.set(yticks=[], xlim=(0, 115), xticks=range(0, 101, 20), xlabel="recited word for word, %")
    axes.invert_yaxis()
    axes.legend(loc="lower right", bbox_to_anchor=(0.85, 0.02), frameon=False, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


if __name__ == "__main__":
    with rc_context({"svg.hashsalt": "lightning_curvature"}):
        draw().savefig(PICTURE, metadata={"Date": None})
