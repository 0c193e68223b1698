"""Does the default edit harm a small network that has nothing to forget? Window and energy.

Protocol: the networks of the tests are trained for 12 epochs on 512 separable images without label noise, and edited at
several energies with factors of windows of several lengths. Accuracy in % on 2000 held-out images: mean over seeds,
and the worst seed.

    PYTHONPATH=. python benchmarks/bench_defaults.py
"""

import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch

from lightning_curvature import CurvatureEditor, KFACEditCallback
from support.environment import parser
from support.tables import table
from tests.support import models
from tests.support.networks import NETWORKS, accuracy

ENERGIES = (1.0, 0.9, 0.87, 0.85, 0.82, 0.8)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--seeds", type=int, default=4)
    arguments.add_argument("--windows", type=int, nargs="+", default=[256, 1024, 4096])
    args = arguments.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    held_out = models.images(2000, seed=2)
    rows = []
    for window in args.windows:
        for name, (kind, options, _) in NETWORKS.items():
            accuracies = []
            for seed in range(args.seeds):
                pl.seed_everything(seed, verbose=False)
                module, callback = kind(**options, lr=0.003), KFACEditCallback(window=window)
                with tempfile.TemporaryDirectory() as folder:
                    trainer = models.trainer(folder, callback, max_epochs=12, enable_checkpointing=False)
                    trainer.fit(module, models.loader(models.images(512)))
                accuracies.append([])
                for energy in ENERGIES:
                    with CurvatureEditor(energy).applied(module, callback.factors):
                        accuracies[-1].append(100 * accuracy(module, held_out))
            columns = zip(*accuracies, strict=True)
            rows.append([window, name, *(f"{sum(c) / len(c):.1f} (worst {min(c):.1f})" for c in columns)])
    print(table(rows, ["window", "network", *(f"energy {e:g}" for e in ENERGIES)]))


if __name__ == "__main__":
    main()
