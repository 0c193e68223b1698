"""Collecting less: what it saves in fit, and what it does to the factors and to the edit.

Protocol. The digits demo's training. For each seed, one run in which several callbacks collect from the same steps:

- ``every=1``: all steps, what the others are compared with; another seed of the random vectors beside it shows the
  noise of the method itself;
- ``every=8``: the default: one window in eight, and the last of the run;
- ``every 8th (16th) step``: what one would try first, windows of the same number of positions from steps further apart;
- ``share=0.25``: all steps, a quarter of the positions (windows hold as many positions, from four times the steps).

Reported, mean and sample standard deviation over seeds: the edit at the default energy, measured on all examples;
training steps between the window's end and the end of the run; distance of the factors from those of ``every=1``,
relative (Frobenius); the standard error that the factor file states; share of kept pairs in common (of those of
``every=1``, in its basis: squared cosines between the kept subspaces of A).

Then the cost: whole trainings without a callback, with the default, and with ``every=1``, in turn; ratios of a round.

    python benchmarks/bench_pauses.py --out benchmarks/results/pauses.json
"""

import argparse
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from measuring import in_turn, ratios, spread, write
from tabulate import tabulate

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.demos.digits import EPOCHS, NoisyDigits, build_model
from lightning_curvature.demos.label_noise import evaluate
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.factors.kronecker import LayerFactors

METRICS = ("memorized", "recovered", "clean_train", "val_accuracy")


class Spaced(KFACEditCallback):
    """Collects from every n-th step."""

    def __init__(self, step: int, **options: Any) -> None:
        super().__init__(every=1, **options)
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Start to record one step in so many."""
        if trainer.fit_loop.total_batch_idx % self.step == 0:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def train(seed: int, callbacks: list[pl.Callback]) -> tuple[pl.LightningModule, NoisyDigits, int]:
    """Train the demo's model."""
    pl.seed_everything(seed, verbose=False)
    data, model = NoisyDigits(seed=seed), build_model()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=callbacks,
        gradient_clip_val=1.0,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    return model.eval(), data, trainer.global_step


def in_common(one: LayerFactors, two: LayerFactors, energy: float) -> float:
    """Return how much of the kept subspace of the first one's inputs lies in the second one's."""
    columns = [int(select_staircase(layer.basis.lam, layer.basis.mu, energy).columns.max()) for layer in (one, two)]
    inside = one.basis.U_A[:, : columns[0]].T @ two.basis.U_A[:, : columns[1]]
    return float(inside.square().sum()) / columns[0]


def effects(seed: int) -> dict[str, dict[str, float]]:
    """Return one row for each way to collect."""
    callbacks = {
        "every=1": KFACEditCallback(every=1, name="a"),
        "every=1, another seed": KFACEditCallback(every=1, name="b", seed=7),
        "every=8 (default)": KFACEditCallback(name="c"),
        "every 8th step": Spaced(8, name="d"),
        "every 16th step": Spaced(16, name="e"),
        "share=0.25": KFACEditCallback(every=1, share=0.25, name="f"),
    }
    model, data, steps = train(seed, list(callbacks.values()))
    rows = {"before": evaluate(model, data.train, data.val)}
    (name, full), *_ = callbacks["every=1"].factors.items()
    for label, callback in callbacks.items():
        layer = callback.factors[name]
        with CurvatureEditor(DEFAULT_ENERGY).applied(model, callback.factors) as report:
            found = evaluate(model, data.train, data.val)
        rows[label] = {
            **found,
            "relative change": report.layers[name].relative_change,
            "kept in common": in_common(full, layer, DEFAULT_ENERGY),
            "distance of A": float((layer.A - full.A).norm() / full.A.norm()),
            "distance of G": float((layer.G - full.G).norm() / full.G.norm()),
            "stated error of A": layer.A_error,
            "stated error of G": layer.G_error,
            "steps old": steps - callback.factors.provenance["step"],
        }
    return rows


def cell(values: list[float], percent: bool) -> str:
    """Return mean and standard deviation."""
    values = [100 * value for value in values] if percent else values
    digits = 1 if percent or max(values) > 10 else 2
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="whole trainings of each kind, for the cost")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results: dict[str, Any] = {}
    runs = [effects(seed) for seed in range(args.seeds)]
    results["effects"] = runs
    columns = list(runs[0]["every=1"])
    for part in (METRICS, columns[len(METRICS) :]):
        rows = [
            [
                label,
                *(
                    cell([run[label][column] for run in runs], column in METRICS) if column in row else ""
                    for column in part
                ),
            ]
            for label, row in runs[0].items()
        ]
        print(f"\nDigits, {args.seeds} seeds\n")
        print(tabulate(rows, ["", *part], tablefmt="github", disable_numparse=True), flush=True)
    torch.set_num_threads(1)  # as small a network is not faster on two, and two are not always there
    results["cost"] = seconds = in_turn(
        {
            "without": lambda: train(0, []),
            "default": lambda: train(0, [KFACEditCallback()]),
            "every=1": lambda: train(0, [KFACEditCallback(every=1)]),
        },
        args.rounds,
        warm_up=0,
    )
    rows = [[name, spread(ratios(seconds, name, "without"), 3)] for name in ("default", "every=1")]
    print(
        f"\nWhole training, without the callback = 1\n\n{tabulate(rows, ['', 'time'], tablefmt='github')}", flush=True
    )
    write(args.out, results)


if __name__ == "__main__":
    main()
