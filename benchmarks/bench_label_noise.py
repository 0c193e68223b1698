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
    python benchmarks/bench_label_noise.py mnist --root FOLDER --out results/mnist.json
    python benchmarks/bench_label_noise.py cifar10 --root FOLDER --out results/cifar10.json
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch.nn.functional as F

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.collect.passes import collect
from lightning_curvature.demos.label_noise import METRICS, compare_methods, energy_curves, evaluate
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.editing.base import DEFAULT_ENERGY
from support.environment import environment, parser, quiet
from support.images import cifar10, digits, fit, mnist
from support.tables import Columns, summary

KINDS = [("sketched", 1), ("sketched", 2), ("sampled", 1), ("sampled", 4), ("empirical", 1)]
LAYERS = {
    "fc2 of the last block": ["*.{last}.fc2"],
    "fc1 of the last block": ["*.{last}.fc1"],
    "both of the last block": ["*.{last}.fc?"],
    "fc2 of all blocks": ["*.fc2"],
    "all MLP layers": ["*"],
}
COLUMNS: Columns = {
    "energy": ("energy", 1, 2),
    "passes": ("passes", 1, 2),
    "error": ("error", 1, 2),
    **{metric: (metric, 100, 1) for metric in METRICS},
}
TABLES = {"methods": ("energy",), "energies": (), "freshness": ("energy",), "fisher": ("passes", "error"), "layers": ()}
"""Columns of each table beside the metrics."""

Row = dict[str, float]
Rows = dict[str, Row]
Edited = Callable[[KroneckerFactors, float], Row]


def run(seed: int, data: NoisyLabels, model: LitViT, epochs: int) -> dict[str, Rows]:
    """Train once and return the rows of the tables."""
    callback = KFACEditCallback()
    fit(model, data, epochs, [callback])
    report, all_examples = data.halves()["report"], (data.train, data.val)
    before = {"before": evaluate(model, *report)}
    collected = callback.run.windows.factors  # of the default layers, whatever the callback has chosen
    curves = energy_curves(model, collected, data)
    methods = compare_methods(curves)

    def edited(factors, energy, part=report):
        with CurvatureEditor(energy).applied(model, factors):
            return {"energy": energy, **evaluate(model, *part)}

    def frozen(**options):
        loader = data.train_dataloader()
        return collect(model, loader, lambda batch: F.cross_entropy(model(batch[0]), batch[1]), **options)

    still = frozen(seed=seed, draws=4)
    freshness = {
        f"{source}, {label} energy": edited(factors, energy, all_examples)
        for label, energy in (("default", DEFAULT_ENERGY), ("chosen", methods["kfac"]["energy"]))
        for source, factors in (("in fit", collected), ("frozen", still))
    }
    with callback.editor.applied(model, callback.factors) as edit:
        kept = [layer.energy_kept for layer in edit.layers.values()]
        default = {"callback": {"energy": sum(kept) / len(kept), **evaluate(model, *report)}}
    curve = {f"kfac {e:g}": {"energy": e, **row} for e, row in curves["report"]["kfac"].items() if e >= 0.6}
    return {
        "methods": {**before, **default, **methods},
        "energies": {**before, **curve},
        "freshness": freshness,
        "fisher": compare_kinds(partial(frozen, seed=seed), edited),
        "layers": {**before, **compare_layers(model, frozen(layers="mlp"), report)},
    }


def compare_kinds(frozen: Callable[..., KroneckerFactors], edited: Edited) -> Rows:
    """Return the edit with each kind of Fisher, and the relative error of G of its first layer."""
    exact = frozen(fisher="exact")
    name = next(iter(exact))
    rows = {"exact": {"passes": 10, "error": 0.0, **edited(exact, DEFAULT_ENERGY)}}
    for kind, draws in KINDS:
        factors = frozen(fisher=kind, draws=draws)
        error = float((factors[name].G - exact[name].G).norm() / exact[name].G.norm())
        passes = 0 if kind == "empirical" else draws
        rows[f"{kind}, {draws}"] = {"passes": passes, "error": error, **edited(factors, DEFAULT_ENERGY)}
    return rows


def compare_layers(model: LitViT, factors: KroneckerFactors, part: tuple) -> Rows:
    """Return the edit of each choice of layers at the default energy."""
    rows = {}
    last = len(model.model.blocks) - 1
    for label, patterns in LAYERS.items():
        with CurvatureEditor(DEFAULT_ENERGY, [pattern.format(last=last) for pattern in patterns]).applied(
            model, factors
        ):
            rows[label] = evaluate(model, *part)
    return rows


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("data", choices=["digits", "mnist", "cifar10"])
    arguments.add_argument("--root", type=Path, help="folder that holds MNIST/raw, or CIFAR-10")
    arguments.add_argument("--weight-decay", type=float, default=0.5, help="of MNIST's model")
    arguments.add_argument("--attention-decay", type=float, default=5.0, help="of MNIST's model, times --weight-decay")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = arguments.parse_args()
    quiet()
    started = time.perf_counter()
    decays = args.weight_decay, args.attention_decay
    runs = []
    for seed in range(args.seeds):
        pl.seed_everything(seed, verbose=False)
        if args.data == "mnist":
            data, model, epochs = mnist(seed, args.root, *decays)
        else:
            data, model, epochs = digits(seed) if args.data == "digits" else cifar10(seed, args.root)
        runs.append(run(seed, data, model, epochs))
        print(f"seed {seed} done after {time.perf_counter() - started:.0f} s", flush=True)
    for title, beside in TABLES.items():
        print(f"\n{args.data}: {title}, {args.seeds} seeds\n")
        columns = {name: COLUMNS[name] for name in (*beside, *METRICS)}
        print(summary([results[title] for results in runs], columns))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
