"""Does the gap between training and validation choose the right edit of a language model that nobody fine-tuned?

A small OLMo-2 that recites, as in ``bench_methods.py``. The callback without arguments would try the default layer (the
last ``down_proj``, hard) and all linear layers (soft); here all MLP layers (hard, scope of the layer, as in the paper)
are beside them. Each candidate gets the budgets of the callback, is measured on training rows and on held-out clean
text (every second window), and by what nobody could use to choose: recited sequences (validation half), sequences of
another kind, clean text that chose nothing, and never-trained text of the memorized domain. ``chosen`` marks what the
rule of :mod:`lightning_curvature.search.gap` takes of the callback's own two.

    python benchmarks/bench_choice.py python --models runs/models
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_curvature import CurvatureEditor
from lightning_curvature.collect.passes import collect
from lightning_curvature.search.gap import Candidate, Tried, choose
from lightning_curvature.trainer.price import LOSS_RISE
from support.environment import environment, parser, quiet
from support.subjects import Text
from support.tables import Columns, summary
from support.texts import TEXTS

COLUMNS: Columns = {
    "training": ("training loss", 1, 3),
    "validation": ("validation loss", 1, 3),
    "strict": ("recited, %", 100, 1),
    "unseen": ("unseen recited, %", 100, 1),
    "times": ("perplexity, times", 1, 3),
    "domain": ("domain, times", 1, 3),
}
ROWS = 8  # training batches, and windows of validation text in tens


def mean_loss(subject: Text, batches: list[torch.Tensor]) -> float:
    """Return the mean loss of batches of rows."""
    with torch.no_grad():
        return sum(float(subject.step(batch)) for batch in batches) / len(batches)


def run(subject: Text) -> dict[str, dict[str, float]]:
    """Return a row for each edit of each candidate."""
    trained = list(subject.data.batches[:ROWS])
    held_out = list(torch.split(subject.tuning[: 10 * ROWS], 16))
    factors = collect(subject.model, subject.rows, subject.step, layers="linear")
    mlp = [name for name in factors if ".mlp." in name]
    made: dict[str, tuple[list[str] | None, dict[str, object]]] = {
        "default layers": ([name for name in mlp if name.endswith("down_proj")][-1:], {}),
        "all linear layers, soft": (None, {"soft": True}),
        "all MLP layers, scope of the layer": (mlp, {"scope": "layer"}),
    }
    candidates = [
        Candidate(name, CurvatureEditor(budget=1.0, layers=layers, **options), factors)
        for name, (layers, options) in made.items()
    ]
    rows: dict[str, dict[str, float]] = {}

    def noted(title: str) -> Callable[[], dict[str, float]]:
        def measure() -> dict[str, float]:
            costs = {"training loss": mean_loss(subject, trained), "validation loss": mean_loss(subject, held_out)}
            row = {"training": costs["training loss"], "validation": costs["validation loss"], **subject.measure()}
            rows[title if title == "unedited" else f"{title} {sum(key.startswith(title) for key in rows)}"] = row
            return costs

        return measure

    before = noted("unedited")()
    gap = _gap
    allowed = {"validation loss": (LOSS_RISE, True)}
    found: list[tuple[Tried, float]] = []
    for candidate in candidates:
        first = len(rows)
        tried, best = choose([candidate], subject.model, noted(candidate.name), before, gap, allowed)
        budgets = list(tried[0].points)
        named = dict(zip(budgets, list(rows)[first:], strict=True))
        for budget, old in named.items():
            rows[f"{candidate.name}, {budget:.3g} nats"] = rows.pop(old)
        if best is not None:
            found.append(best)
            rows[f"**{candidate.name}: its best**"] = rows[f"{candidate.name}, {best[1]:.3g} nats"]
    tried, budget = min(found[:2], key=lambda entry: gap(entry[0].points[entry[1]]))
    rows["**chosen**"] = rows[f"{tried.candidate.name}, {budget:.3g} nats"]
    return rows


def _gap(costs: dict[str, float]) -> float:
    return costs["validation loss"] - costs["training loss"]


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("data", choices=TEXTS)
    arguments.add_argument("--models", type=Path, required=True, help="folder for trained models")
    arguments.add_argument("--root", type=Path, help="folder with the files of WikiText-2 and the recited Dolma texts")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers, written after each seed")
    args = arguments.parse_args()
    quiet()
    runs = []
    for seed in range(args.seeds):
        runs.append(run(Text(args.data, seed, args.models, args.root)))
        print(f"\n{args.data}, {len(runs)} seeds\n\n{summary(runs, COLUMNS)}", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
