"""Forgetting noised labels: methods, freshness of factors collected in fit, and kinds of Fisher.

Protocol, for each seed: a small ViT is trained on images of which 10 % carry a wrong label, with
``Trainer(callbacks=[KFACEditCallback()])`` and no argument. Then

1. *methods*: each method gets the energy of highest validation accuracy among those that leave at most 20 % of the
   noised labels memorized on the tuning part (half of the training and of the validation examples); all numbers are
   from the other half, the report part;
2. *freshness*: the same edit with factors of one pass (4 draws) over the frozen final model, at the same energies;
   measured on all training and validation examples, since here nothing is chosen;
3. *kinds of Fisher*, all on the frozen model and the training set: relative Frobenius error of G against ``exact``,
   and the edit at the default energy;
4. *layers*: the edit of other layers at the default energy, with factors of a frozen pass over all MLP layers.

Mean and sample standard deviation over seeds.

    python benchmarks/bench_label_noise.py digits --out results/digits.json
    python benchmarks/bench_label_noise.py mnist --root ../shared/data --out results/mnist.json
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from tabulate import tabulate

from lightning_curvature import CurvatureEditor, KFACEditCallback
from lightning_curvature.collect.passes import collect
from lightning_curvature.demos.digits import EPOCHS, NoisyDigits, build_model
from lightning_curvature.demos.label_noise import METRICS, compare_methods, energy_curves, evaluate
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.editing.base import DEFAULT_ENERGY

KINDS = [("sketched", 1), ("sketched", 2), ("sampled", 1), ("sampled", 4), ("empirical", 1)]


def digits(seed: int) -> tuple[NoisyLabels, LitViT, int]:
    """Return the digits demo's data, model and epochs."""
    return NoisyDigits(seed=seed), build_model(), EPOCHS


def mnist(seed: int, root: Path, decay: float, attention: float) -> tuple[NoisyLabels, LitViT, int]:
    """Return 4000 training and 2000 validation images of MNIST, a model for them, and epochs."""
    from torchvision.datasets import MNIST

    data = MNIST(root)
    # Some copies of the files are sorted by class: the first images are no sample of it.
    some = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(seed))[:6000]
    images, labels = data.data[some].float() / 255 - 0.5, data.targets[some]
    model = LitViT(image_size=28, patch=7, weight_decay=decay, attention_decay=attention)
    return NoisyLabels(images, labels, 4000, seed=seed), model, 80


def run(seed: int, data: NoisyLabels, model: LitViT, epochs: int) -> dict[str, dict[str, dict[str, float]]]:
    """Train once and return the rows of the three tables."""
    callback = KFACEditCallback()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[callback],
        gradient_clip_val=1.0,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    model.eval()
    train, val = data.halves()["report"]
    before = evaluate(model, train, val)
    curves = energy_curves(model, callback.factors, data)
    methods = compare_methods(curves)
    energy = methods["kfac"]["energy"]

    def edited(factors, energy, part=(train, val)):
        with CurvatureEditor(energy).applied(model, factors):
            return {"energy": energy, **evaluate(model, *part)}

    def frozen(**options):
        loader = data.train_dataloader()
        return collect(model, loader, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), **options)

    still = frozen(seed=seed, draws=4)
    everything = data.train, data.val
    freshness = {
        f"{source}, {label} energy": edited(factors, value, everything)
        for label, value in (("default", DEFAULT_ENERGY), ("chosen", energy))
        for source, factors in (("in fit", callback.factors), ("frozen", still))
    }
    exact = frozen(fisher="exact")
    name = next(iter(exact))
    kinds = {"exact": {"passes": 10, "error": 0.0, **edited(exact, DEFAULT_ENERGY)}}
    for kind, draws in KINDS:
        factors = frozen(fisher=kind, draws=draws, seed=seed)
        error = float((factors[name].G - exact[name].G).norm() / exact[name].G.norm())
        passes = 0 if kind == "empirical" else draws
        kinds[f"{kind}, {draws}"] = {"passes": passes, "error": error, **edited(factors, DEFAULT_ENERGY)}
    every = frozen(layers="mlp")
    choices = {
        "fc2 of the last block": ["*.1.fc2"],
        "fc1 of the last block": ["*.1.fc1"],
        "both of the last block": ["*.1.fc?"],
        "fc2 of both blocks": ["*.fc2"],
        "all MLP layers": None,
    }
    layers = {}
    for label, patterns in choices.items():
        with CurvatureEditor(DEFAULT_ENERGY, patterns).applied(model, every):
            layers[label] = evaluate(model, train, val)
    default = edited(callback.factors, DEFAULT_ENERGY)
    curve = {f"kfac {e:g}": {"energy": e, **row} for e, row in curves["report"]["kfac"].items() if e >= 0.6}
    return {
        "methods": {"before": before, "kfac, default": default, **methods},
        "energies": {"before": before, **curve},
        "freshness": freshness,
        "fisher": kinds,
        "layers": {"before": before, **layers},
    }


def summary(runs: list[dict[str, dict[str, float]]], columns: list[str]) -> str:
    """Return the mean and standard deviation over seeds as a table, rates in percent."""
    body = []
    for row in runs[0]:
        cells = [row]
        for column in columns:
            values = [
                100 * run[row][column] if column in METRICS else run[row][column] for run in runs if column in run[row]
            ]
            digits = 1 if column in METRICS else 2
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}" if values else "")
        body.append(cells)
    return tabulate(body, ["", *columns], tablefmt="github", disable_numparse=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["digits", "mnist"])
    parser.add_argument("--root", type=Path, help="folder that holds MNIST/raw")
    parser.add_argument("--weight-decay", type=float, default=0.5, help="of MNIST's model")
    parser.add_argument("--attention-decay", type=float, default=5.0, help="of MNIST's model, times --weight-decay")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    started = time.perf_counter()
    decays = args.weight_decay, args.attention_decay
    runs = []
    for seed in range(args.seeds):
        pl.seed_everything(seed, verbose=False)
        data, model, epochs = digits(seed) if args.data == "digits" else mnist(seed, args.root, *decays)
        runs.append(run(seed, data, model, epochs))
        print(f"seed {seed} done after {time.perf_counter() - started:.0f} s", flush=True)
    for title, columns in (
        ("methods", ["energy"]),
        ("energies", []),
        ("freshness", ["energy"]),
        ("fisher", ["passes", "error"]),
        ("layers", []),
    ):
        print(f"\n{args.data}: {title}, {args.seeds} seeds\n")
        print(summary([results[title] for results in runs], [*columns, *METRICS]))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": pl.__version__,
            "threads": torch.get_num_threads(),
            "processor": platform.machine(),
        }
        args.out.write_text(json.dumps({"environment": environment, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
