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
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from bench_label_noise import digits
from subjects import IMAGE_COLUMNS, TEXT_COLUMNS, TEXTS, Subject, Text, subject
from tables import DOCS, parser, read, replace_section, run, summary
from torch import Tensor

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.factors.kronecker import LayerFactors
from lightning_curvature.text.evaluation import window_nll
from lightning_curvature.text.matching import match_perplexity, perplexity_ratio

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
AGREEMENT = {
    "kept": ("kept", 1, 2),
    "chance": ("chance", 1, 2),
    "angles_A": ("angles, A", 1, 2),
    "chance_A": ("chance", 1, 2),
    "angles_G": ("angles, G", 1, 2),
    "chance_G": ("chance", 1, 2),
}
TARGET = {
    "edits": ("edits tried", 1, 1),
    "chosen": ("chosen on", 1, 4),
    "held_out": ("other text", 1, 4),
    "low": ("95 % from", 1, 4),
    "high": ("to", 1, 4),
    "violations": ("not monotone", 1, 1),
}


def kept_overlap(one: LayerFactors, two: LayerFactors, energy: float) -> tuple[float, float]:
    """Return the share of the directions kept by one set of factors that the other one keeps, and its chance level."""
    masks = []
    for basis in (one.basis, two.basis):
        columns = select_staircase(basis.lam, basis.mu, energy).columns
        masks.append((torch.arange(len(basis.mu)) < columns[:, None]).double())
    rows = (one.basis.U_G.T @ two.basis.U_G).square()
    columns = (one.basis.U_A.T @ two.basis.U_A).square()
    inside = float((masks[0] * (rows @ masks[1] @ columns.T)).sum() / masks[0].sum())
    return inside, float(masks[1].mean())


def angles(one: Tensor, two: Tensor, values: Tensor) -> tuple[float, float]:
    """Return the mean squared cosine between the leading eigenvectors that hold 90 % of a trace, and its chance."""
    k = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    return float((one[:, :k].T @ two[:, :k]).square().sum() / k), k / len(values)


def agreement(one: KroneckerFactors, two: KroneckerFactors, energy: float) -> dict[str, float]:
    """Return how much two sets of factors agree, mean over layers."""
    found: dict[str, list[float]] = {key: [] for key in AGREEMENT}
    for name in one:
        a, b = one[name], two[name]
        pairs = (
            *kept_overlap(a, b, energy),
            *angles(a.basis.U_A, b.basis.U_A, a.basis.mu),
            *angles(a.basis.U_G, b.basis.U_G, a.basis.lam),
        )
        for key, value in zip(AGREEMENT, pairs, strict=True):
            found[key].append(value)
    return {key: statistics.mean(values) for key, values in found.items()}


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
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[keep],
        gradient_clip_val=1.0,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return keep.kept, model.eval()


def results(args: argparse.Namespace, seed: int) -> Iterator[dict[str, object]]:
    """Yield the results of one seed."""
    model = subject(args.data, seed, args)

    def factors(rows: Any = None, draw: int = 0, of: Subject = model) -> KroneckerFactors:
        return collect(of.model, rows or of.rows, of.step, layers=of.layers, seed=draw)

    def edited(row: str, found: KroneckerFactors, energy: float, table: str = "rows") -> dict[str, object]:
        with CurvatureEditor(energy).applied(model.model, found):
            return {"table": table, "row": row, "setting": energy, **model.measure()}

    full = factors()
    yield {"table": "rows", "row": "not edited", **model.measure()}
    for fraction in FRACTIONS:
        rows = model.rows[: max(round(fraction * len(model.rows)), 1)]
        some = full if fraction == 1.0 else factors(rows)
        count = sum(len(batch if isinstance(batch, Tensor) else batch[0]) for batch in rows)
        row = f"{count} rows"
        yield {"table": "agreement", "row": f"{row} and all of them", **agreement(some, full, DEFAULT_ENERGY)}
        yield edited(f"{row}, fixed energy", some, DEFAULT_ENERGY)
        if isinstance(model, Text):
            yield edited(f"{row}, 1.05 times the perplexity", some, model.match(CurvatureEditor(), some, 1.05, {}))
    yield {"table": "agreement", "row": "other random vectors", **agreement(full, factors(draw=1), DEFAULT_ENERGY)}
    half = len(model.rows) // 2
    halves = factors(model.rows[:half]), factors(model.rows[half:])
    yield {"table": "agreement", "row": "two halves of the data", **agreement(*halves, DEFAULT_ENERGY)}
    other = subject(args.data, (seed + 1) % 3, args)
    yield {
        "table": "agreement",
        "row": "the model of another seed",
        **agreement(full, factors(of=other), DEFAULT_ENERGY),
    }
    if isinstance(model, Text):
        clean = model.data.held_out["clean"]
        before = window_nll(model.lm, clean["report"])
        for limit in Text.limits:
            match = match_perplexity(model.lm, full, CurvatureEditor(), clean["tuning"], limit, module=model.model)
            with CurvatureEditor(match.energy).applied(model.model, full):
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
        return
    kept, again = checkpoints(seed)
    last = max(kept)
    model.model = again
    final = factors()
    for epoch, weights in kept.items():
        again.load_state_dict(weights)
        old = factors()
        again.load_state_dict(kept[last])
        yield {"table": "agreement", "row": f"epoch {epoch} and epoch {last}", **agreement(old, final, DEFAULT_ENERGY)}
        yield edited(f"factors of epoch {epoch}", old, DEFAULT_ENERGY, "older")


def page(name: str, runs: list[Any]) -> str:
    """Return the tables of one data set."""
    measured = {
        key: value for key, value in (TEXT_COLUMNS if name in TEXTS else IMAGE_COLUMNS).items() if key != "overlap"
    }
    parts = []
    for title, key, columns in (
        ("The edit with factors of fewer rows:", "rows", measured),
        ("The final model with factors of an earlier checkpoint:", "older", measured),
        ("A price as the target, and what it is on other text:", "target", TARGET),
        ("Agreement of two sets of factors:", "agreement", AGREEMENT),
    ):
        found = [{row["row"]: row for row in run if row["table"] == key} for run in runs]
        if any(found):
            parts += [title, "", summary(found, columns), ""]
    return "\n".join(parts)


def main() -> None:
    """Run the benchmark, or make its tables."""
    args = parser(__doc__, ("python", "digits")).parse_args()
    if args.data == "tables":
        for name in ("python", "digits"):
            runs, facts = read("robustness", name)
            replace_section(DOCS / "evidence.md", f"robustness-{name}", f"\n{page(name, runs)}\n{facts}\n")
    else:
        print(page(args.data, list(run("robustness", args, partial(results, args))["runs"].values())))


if __name__ == "__main__":
    main()
