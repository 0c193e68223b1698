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

import logging
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.demos.label_noise import METRICS, evaluate
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.factors.layer import LayerFactors
from support.environment import parser
from support.images import digits, fit
from support.measuring import in_turn, ratios, show, spread, write
from support.tables import summary

METRIC_COLUMNS = {name: (name, 100, 1) for name in METRICS}
FACTOR_COLUMNS = {
    **{name: (name, 1, 2) for name in ("relative change", "kept in common", "distance of A", "distance of G")},
    **{name: (name, 1, 2) for name in ("stated error of A", "stated error of G")},
    "steps old": ("steps old", 1, 1),
}


class Spaced(KFACEditCallback):
    """Collects from every n-th step."""

    def __init__(self, step: int, **options: Any) -> None:
        super().__init__(every=1, **options)
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """Start to record one step in so many."""
        if trainer.fit_loop.total_batch_idx % self.step == 0:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


def train(seed: int, callbacks: list[pl.Callback]) -> tuple[pl.LightningModule, NoisyLabels, int]:
    """Train the digits demo's model; return it in eval mode, its data, and the number of steps."""
    pl.seed_everything(seed, verbose=False)
    data, model, epochs = digits(seed)
    trainer = fit(model, data, epochs, callbacks)
    return model, data, trainer.global_step


def in_common(full: LayerFactors, less: LayerFactors, energy: float) -> float:
    """Return how much of the subspace of inputs that ``full`` keeps lies in the one that ``less`` keeps."""
    counts = [int(select_staircase(layer.basis.lam, layer.basis.mu, energy).columns.max()) for layer in (full, less)]
    inside = full.basis.U_A[:, : counts[0]].T @ less.basis.U_A[:, : counts[1]]
    return float(inside.square().sum()) / counts[0]


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
    (name, full), *_ = callbacks["every=1"].run.windows.factors.items()
    for label, callback in callbacks.items():
        factors = callback.run.windows.factors
        layer = factors[name]
        with CurvatureEditor(DEFAULT_ENERGY).applied(model, factors) as report:
            metrics = evaluate(model, data.train, data.val)
        rows[label] = {
            **metrics,
            "relative change": report.layers[name].relative_change,
            "kept in common": in_common(full, layer, DEFAULT_ENERGY),
            "distance of A": float((layer.A - full.A).norm() / full.A.norm()),
            "distance of G": float((layer.G - full.G).norm() / full.G.norm()),
            "stated error of A": layer.A_error,
            "stated error of G": layer.G_error,
            "steps old": steps - factors.provenance["step"],
        }
    return rows


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--rounds", type=int, default=3, help="whole trainings of each kind, for the cost")
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = arguments.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    runs = [effects(seed) for seed in range(args.seeds)]
    for columns in (METRIC_COLUMNS, FACTOR_COLUMNS):
        print(f"\nDigits, {args.seeds} seeds\n\n{summary(runs, columns)}", flush=True)
    torch.set_num_threads(1)  # as small a network is not faster on two, and two are not always there
    seconds = in_turn(
        {
            "without": lambda: train(0, []),
            "default": lambda: train(0, [KFACEditCallback()]),
            "every=1": lambda: train(0, [KFACEditCallback(every=1)]),
        },
        args.rounds,
        warm_up=0,
    )
    rows = [[name, spread(ratios(seconds, name, "without"), 3)] for name in ("default", "every=1")]
    show("Whole training, without the callback = 1", rows, ["", "time"])
    write(args.out, {"effects": runs, "cost": seconds})


if __name__ == "__main__":
    main()
