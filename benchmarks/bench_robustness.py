"""What the factors depend on: rows, random vectors, checkpoints, models.

1. *rows*: factors of a part of the data against those of all of it: the edit at one fixed energy, and at 1.05 times the
   perplexity of tuning text (images: the default energy alone);
2. *agreement* of two sets of factors: other random vectors over the same data; the two halves of the data; earlier
   checkpoints of the same run (digits, which are trained again for it); the model of another seed. ``kept`` is the
   share of the directions that the first one keeps which lie in those that the second keeps (1 if they are the same,
   ``chance`` for unrelated ones, the kept share of all); ``angles`` are the mean squared cosines of the principal
   angles between the leading eigenvectors, those that hold 90 % of the trace, of A and of G (chance: their share);
3. *older factors*: the final model edited with factors of earlier checkpoints;
4. *target* (text): K-FAC at 1.02, 1.05, 1.10 and 1.20 times the perplexity of 200 windows of tuning text; what it costs
   there and on 190 other windows, with the 95 % interval of a paired bootstrap over windows.

Mean over layers; mean and sample standard deviation over seeds.

    python benchmarks/bench_robustness.py python --models runs/models
    python benchmarks/bench_robustness.py digits --models runs/models
    python benchmarks/bench_robustness.py tables  # from results into docs/evidence.md
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.text.evaluation import window_nll
from lightning_curvature.text.matching import match_perplexity, perplexity_ratio
from support.images import digits, fit
from support.seeds import Row, run_or_write, seeds_parser
from support.subjects import Subject, Text, columns, subject
from support.tables import Columns, by_row, summary

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
AGREEMENT: Columns = {
    "kept": ("kept", 1, 2),
    "chance": ("chance", 1, 2),
    "angles_A": ("angles, A", 1, 2),
    "chance_A": ("chance", 1, 2),
    "angles_G": ("angles, G", 1, 2),
    "chance_G": ("chance", 1, 2),
}
TARGET: Columns = {
    "edits": ("edits tried", 1, 1),
    "chosen": ("chosen on", 1, 4),
    "held_out": ("other text", 1, 4),
    "low": ("95 % from", 1, 4),
    "high": ("to", 1, 4),
    "violations": ("not monotone", 1, 1),
}


def kept_overlap(first: LayerFactors, second: LayerFactors, energy: float) -> tuple[float, float]:
    """Return how much of the directions kept with the first factors is kept with the second, and its chance level."""
    masks = []
    for basis in (first.basis, second.basis):
        counts = select_staircase(basis.lam, basis.mu, energy).columns
        masks.append((torch.arange(len(basis.mu)) < counts[:, None]).double())
    rows = (first.basis.U_G.T @ second.basis.U_G).square()
    columns = (first.basis.U_A.T @ second.basis.U_A).square()
    inside = float((masks[0] * (rows @ masks[1] @ columns.T)).sum() / masks[0].sum())
    return inside, float(masks[1].mean())


def angles(first: Tensor, second: Tensor, values: Tensor) -> tuple[float, float]:
    """Return the mean squared cosine between the leading eigenvectors that hold 90 % of a trace, and its chance."""
    k = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    return float((first[:, :k].T @ second[:, :k]).square().sum() / k), k / len(values)


def agreement(first: KroneckerFactors, second: KroneckerFactors, energy: float = DEFAULT_ENERGY) -> dict[str, float]:
    """Return how much two sets of factors agree, mean over layers."""
    measures: dict[str, list[float]] = {key: [] for key in AGREEMENT}
    for name in first:
        a, b = first[name], second[name]
        values = (
            *kept_overlap(a, b, energy),
            *angles(a.basis.U_A, b.basis.U_A, a.basis.mu),
            *angles(a.basis.U_G, b.basis.U_G, a.basis.lam),
        )
        for key, value in zip(AGREEMENT, values, strict=True):
            measures[key].append(value)
    return {key: statistics.mean(values) for key, values in measures.items()}


def checkpoints(seed: int) -> tuple[dict[int, dict[str, Tensor]], pl.LightningModule]:
    """Train the digits' model again and return its weights after some epochs."""

    class Keep(pl.Callback):
        def __init__(self) -> None:
            self.kept: dict[int, dict[str, Tensor]] = {}

        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch + 1 in (70, 100, 120, 130, 140):
                weights = {key: value.clone() for key, value in module.state_dict().items()}
                self.kept[trainer.current_epoch + 1] = weights

    pl.seed_everything(seed, verbose=False)
    data, model, epochs = digits(seed)
    keep = Keep()
    fit(model, data, epochs, [keep])
    return keep.kept, model


def factors_of(model: Subject, rows: Any = None, draw: int = 0) -> KroneckerFactors:
    """Collect factors of a subject over some of its rows, or all of them."""
    return collect(model.model, rows or model.rows, model.step, layers=model.layers, seed=draw)


def edited(table: str, row: str, model: Subject, factors: KroneckerFactors, energy: float = DEFAULT_ENERGY) -> Row:
    """Return what is measured under an edit."""
    with CurvatureEditor(energy).applied(model.model, factors):
        return {"table": table, "row": row, "setting": energy, **model.measure()}


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield the results of one seed."""
    model = subject(args.data, seed, args)
    full = factors_of(model)
    yield {"table": "rows", "row": "not edited", **model.measure()}
    for fraction in FRACTIONS:
        rows = model.rows[: max(round(fraction * len(model.rows)), 1)]
        factors = full if fraction == 1.0 else factors_of(model, rows)
        count = sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in rows)
        row = f"{count} rows"
        yield {"table": "agreement", "row": f"{row} and all of them", **agreement(factors, full)}
        yield edited("rows", f"{row}, fixed energy", model, factors)
        if isinstance(model, Text):
            energy = model.match(CurvatureEditor(), factors, 1.05, {})
            yield edited("rows", f"{row}, 1.05 times the perplexity", model, factors, energy)
    yield {"table": "agreement", "row": "other random vectors", **agreement(full, factors_of(model, draw=1))}
    half = len(model.rows) // 2
    halves = factors_of(model, model.rows[:half]), factors_of(model, model.rows[half:])
    yield {"table": "agreement", "row": "two halves of the data", **agreement(*halves)}
    next_model = subject(args.data, (seed + 1) % 3, args)
    yield {"table": "agreement", "row": "the model of another seed", **agreement(full, factors_of(next_model))}
    yield from targets(model, full) if isinstance(model, Text) else older(model, seed)


def targets(model: Text, factors: KroneckerFactors) -> Iterator[Row]:
    """Yield what edits within a price on tuning text cost there, and on other text."""
    clean = model.data.held_out["clean"]
    before = window_nll(model.lm, clean["report"])
    for limit in Text.limits:
        match = match_perplexity(model.lm, factors, CurvatureEditor(), clean["tuning"], limit, module=model.model)
        with CurvatureEditor(match.energy).applied(model.model, factors):
            ratio = perplexity_ratio(before, window_nll(model.lm, clean["report"]))
        yield {
            "table": "target",
            "row": f"{limit:g}",
            "chosen": match.value,
            "edits": len(match.points) - 1,
            "held_out": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            "violations": len(match.violations()),
        }


def older(model: Subject, seed: int) -> Iterator[Row]:
    """Yield how much factors of earlier checkpoints agree with the last ones, and their edits of the final model."""
    kept, network = checkpoints(seed)
    last = max(kept)
    model.model = network
    final = factors_of(model)
    for epoch, weights in kept.items():
        network.load_state_dict(weights)
        old = factors_of(model)
        network.load_state_dict(kept[last])
        yield {"table": "agreement", "row": f"epoch {epoch} and epoch {last}", **agreement(old, final)}
        yield edited("older", f"factors of epoch {epoch}", model, old)


def page(name: str, runs: list[Any]) -> str:
    """Return the tables of one data set."""
    parts = []
    for title, key, shown in (
        ("The edit with factors of fewer rows:", "rows", columns(name, "overlap")),
        ("The final model with factors of an earlier checkpoint:", "older", columns(name, "overlap")),
        ("A price as the target, and what it is on other text:", "target", TARGET),
        ("Agreement of two sets of factors:", "agreement", AGREEMENT),
    ):
        rows = by_row(runs, key)
        if any(rows):
            parts += [title, "", summary(rows, shown), ""]
    return "\n".join(parts)


def main() -> None:
    """Run the benchmark, or make its tables."""
    args = seeds_parser(__doc__, ("python", "digits")).parse_args()
    run_or_write("robustness", args, results, page, "evidence.md", ("python", "digits"))


if __name__ == "__main__":
    main()
