"""Where memorization sits in the spectrum, and what else can be said of it: the analyses, on the models of the demos.

For each seed, the model of a demo, and factors collected as the demos do.

1. *bands*: activation strength of memorized over clean examples in each band (``compare_bands``), in the curvature
   basis and in the SVD basis, with and without unit vectors; and whether it rises from band to band.
2. *detection*: area under the ROC curve of each score; text against never-memorized windows of the same domain and of
   ordinary text, images against training images with a true label.
3. *directions*: share of memorized ones among the 20 examples that use each of the 20 flattest, and sharpest, input
   directions of the last layer most.
4. *one example, many examples*: the sharpest direction of the GGN of one example (16 memorized, 16 clean), with respect
   to the MLP weights of the last block, and the curvature along it in averages over up to 128 examples: clean ones
   alone, or with memorized ones among them as in training (one in eight of text, one in ten of images).
5. *order*: rank correlation of predicted curvature with ``v^T GGN v`` and ``v^T H v`` along 200 directions of the last
   layer, over the whole spectrum and by band, with the labels of training.
6. *layers together*: the change of loss (nats) and of recitation when the flat part of each block's MLP is removed
   alone and in all blocks together (energy 0.85); then all MLPs, all attention, and both.

Memorized are sequences of the validation half of the repeated ones that the model recites, or images of the report
half whose wrong label it predicts; the changes of 6 are those of all of them.
Mean and sample standard deviation over seeds.

    python benchmarks/bench_analysis.py python --models runs/models
    python benchmarks/bench_analysis.py digits --models runs/models
    python benchmarks/bench_analysis.py mnist --models runs/models --root FOLDER  # of MNIST/raw
    python benchmarks/bench_analysis.py tables  # from results into docs/analysis.md
"""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis import Gathering, Products, curvature_order, gather, interplay
from lightning_curvature.analysis.bands import LABELS
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.collect.eigenvalues import correct_eigenvalues
from lightning_curvature.collect.passes import collect
from lightning_curvature.demos.analyses import analyse_images
from lightning_curvature.demos.label_noise import predict
from lightning_curvature.demos.recitation import PREFIX, SUFFIX
from lightning_curvature.demos.text_analyses import analyse_text
from lightning_curvature.editing.base import DEFAULT_ENERGY
from lightning_curvature.text.evaluation import recited
from lightning_curvature.text.suffixes import Suffixes, suffix_logits
from support.seeds import Row, run_or_write, seeds_parser
from support.subjects import Subject, Text, subject
from support.tables import all_tables

EXAMPLES, SIZES = 16, (1, 2, 4, 8, 16, 32, 64, 128)
SCORES = ("kfac", "ekfac", "coupled")
DATA = ("python", "digits", "mnist")
SHORT = re.compile(r"model\.(model\.)?(layers|blocks)\.")


def analyses(model: Subject, factors: KroneckerFactors) -> Analyses:
    """Return what the demos write."""
    if isinstance(model, Text):
        return analyse_text(model.model, factors, model.data)
    return analyse_images(model.model, factors, model.halves["report"][0])


def pools(model: Subject) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return memorized and clean examples, more to average with, and the fraction of memorized ones in training."""
    if isinstance(model, Text):
        length = PREFIX + SUFFIX
        memorized = torch.tensor([sequence.ids for sequence in recited(model.lm, model.data.half("validation"))])
        clean = model.data.held_out["clean"]["report"][:, :length]
        return memorized, clean, model.data.collected[:200, :length], 1 / 8
    images, noised, given = model.halves["report"][0].tensors
    rows = torch.arange(len(images))
    predicted = predict(model.model, model.halves["report"][0]).argmax(1)
    wrong, right = rows[(noised != given) & (predicted == noised)], rows[noised == given]
    return wrong, right[:200], right[200:400], 1 / 10


def products(model: Subject, layers: Sequence[str], row: Tensor) -> Products:
    """Return the curvature of one example: its suffix, or its label."""
    if isinstance(model, Text):
        batch = Suffixes(row[None], PREFIX)
        return Products(model.model, layers, lambda: suffix_logits(model.lm, batch)[0][0])
    images = model.halves["report"][0].tensors[0]
    return Products(model.model, layers, lambda: model.model(images[row][None]))


def gatherings(model: Subject, layers: Sequence[str], seed: int) -> Iterator[tuple[str, Gathering]]:
    """Yield what becomes of single examples' curvature in two kinds of populations."""
    memorized, clean, more, fraction = pools(model)
    generator = torch.Generator().manual_seed(seed)
    examples = torch.cat([memorized, clean, more])
    first = len(memorized)
    rest = [*range(first + len(clean), len(examples))]
    repeated = torch.randperm(first, generator=generator).tolist()
    singles = repeated[:EXAMPLES], [*range(first, first + EXAMPLES)]
    count = round(fraction * SIZES[-1])
    mixed = [*rest[: SIZES[-1] - count], *(repeated[EXAMPLES:] or repeated)[:count]]
    mixed = [mixed[place] for place in torch.randperm(len(mixed), generator=generator).tolist()]
    for name, population in (("clean alone", rest[: SIZES[-1]]), ("as in training", mixed)):
        sizes = [size for size in SIZES if size <= len(population)]
        yield name, gather(lambda i: products(model, layers, examples[i]), *singles, population, sizes)


def orders(model: Subject, factors: KroneckerFactors, layer: str, seed: int) -> Iterator[Row]:
    """Yield rank correlations of the last layer."""
    if isinstance(model, Text):
        rows = model.data.collected[200:264]
        logits = partial(_next_logits, model, rows)
        targets = rows[:, 1:].flatten()
    else:
        images, noised, _ = model.halves["report"][0].tensors
        logits, targets = partial(model.model, images), noised
    curvature = Products(model.model, [layer], logits, targets)
    order = curvature_order(curvature, layer, factors[layer], SCORES, seed=seed)
    for score in SCORES:
        for measured in ("ggn", "hessian"):
            yield {"table": "order", "row": f"{score}, {measured}", **order.by_band(score, measured)}


def _next_logits(model: Text, rows: Tensor) -> Tensor:
    return model.lm(input_ids=rows[:, :-1], use_cache=False).logits.flatten(0, 1)


def losses(model: Subject) -> Callable[[], dict[str, float]]:
    """Return what measures losses and recitation."""
    if isinstance(model, Text):
        clean = model.data.held_out["clean"]["report"][:64]
        repeated = Suffixes(torch.tensor([sequence.ids for sequence in model.data.half("validation")]), PREFIX)

        def measure() -> dict[str, float]:
            with torch.no_grad():
                ordinary = F.cross_entropy(_next_logits(model, clean), clean[:, 1:].flatten())
                logits, suffixes = suffix_logits(model.lm, repeated)
            memorized = F.cross_entropy(logits.flatten(0, 1), suffixes.flatten())
            recited = (logits.argmax(-1) == suffixes).all(1).double().mean()
            return {"clean loss": float(ordinary), "memorized loss": float(memorized), "recited": float(recited)}

        return measure

    train, val = model.halves["report"]

    def measure_images() -> dict[str, float]:
        images, noised, given = train.tensors
        wrong = noised != given
        with torch.no_grad():
            logits, val_logits = model.model(images[wrong]), model.model(val.tensors[0])
        return {
            "clean loss": float(F.cross_entropy(val_logits, val.tensors[1])),
            "memorized loss": float(F.cross_entropy(logits, noised[wrong])),
            "recited": float((logits.argmax(1) == noised[wrong]).double().mean()),
        }

    return measure_images


def together(model: Subject, seed: int) -> Iterator[Row]:
    """Yield the changes that edits make alone and together."""
    options: dict[str, Any] = {"positions": "contributing", "seed": seed}
    factors = collect(model.model, model.rows, model.step, layers=["mlp", "attention"], **options)
    attention = [name for name in factors if "attn" in name or "attention" in name]
    mlp = [name for name in factors if name not in attention]
    blocks: dict[str, list[str]] = {}
    for name in mlp:
        blocks.setdefault(SHORT.sub("", name).split(".")[0], []).append(name)
    parts = {
        "mlp": {f"MLP of block {block}": names for block, names in blocks.items()},
        "attention": {"all MLPs": mlp, "all attention": attention},
    }
    for part, groups in parts.items():
        effects = interplay(model.model, factors, CurvatureEditor(DEFAULT_ENERGY), groups, losses(model))
        changes = {
            name: {key: row[key] - effects.before[key] for key in row}
            for name, row in (*effects.alone.items(), ("together", effects.together))
        }
        changes["more than the sum"] = {key: effects.excess(key) for key in effects.before}
        for name, row in changes.items():
            yield {"table": f"together, {part}", "row": name, **row}


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield the results of one seed."""
    model = subject(args.data, seed, args)
    factors = collect(model.model, model.rows, model.step, layers=model.layers, seed=seed, coupled=True)
    factors = correct_eigenvalues(model.model, factors, model.rows, model.step, seed=seed + 1)
    written = analyses(model, factors)
    if args.pages:
        written.save(args.models / f"{args.data}-{seed}")
    yield from demonstrated(written)
    last = list(factors)[-1]
    block = last.rpartition(".mlp")[0] or last.rpartition(".")[0]
    weights = [name for name, _ in model.model.named_modules() if name in factors and name.startswith(f"{block}.")]
    for population, gathered in gatherings(model, weights, seed):
        for kind, curves in (("memorized", gathered.memorized), ("clean", gathered.clean)):
            medians = torch.tensor(curves, dtype=torch.float64).quantile(0.5, 0).tolist()
            sizes = {str(size): value for size, value in zip(gathered.sizes, medians, strict=True)}
            trace = float(torch.tensor(gathered.traces[kind == "clean"], dtype=torch.float64).quantile(0.5))
            yield {"table": "gathering", "row": f"{population}: {kind}", "trace": trace, **sizes}
        yield {"table": "gathering", "row": f"{population}: memorized flatter from", "crossing": gathered.crossing or 0}
    yield from orders(model, factors, last, seed)
    yield from together(model, seed)


def demonstrated(written: Analyses) -> Iterator[Row]:
    """Yield what the demos' analyses say."""
    for comparison in written.bands:
        unit = ", unit vectors" if comparison.normalized else ""
        row = f"{SHORT.sub('', comparison.layer)}, {comparison.basis}{unit}"
        ratios = dict(zip(LABELS, comparison.ratio, strict=True))
        yield {"table": "bands", "row": row, **ratios, "rising": float(comparison.rising)}
    for against, scores in written.detection.items():
        for name, area in scores.auroc.items():
            yield {"table": f"detection, {against}", "row": SHORT.sub("", name), "AUROC": area}
    for use in written.directions:
        kind = "20 flattest" if use.flat else "20 sharpest"
        yield {"table": "directions", "row": kind, "precision": use.mean_precision, "chance": use.chance}


def page(_data: str, runs: Sequence[Sequence[Row]]) -> str:
    """Return all tables of one data set."""
    return all_tables(runs, {"gathering": 4})


def main() -> None:
    """Run the benchmark, or make its tables."""
    arguments = seeds_parser(__doc__, DATA)
    arguments.add_argument("--pages", action="store_true", help="also write analysis.json beside each model")
    run_or_write("analysis", arguments.parse_args(), results, page, "analysis.md", DATA)


if __name__ == "__main__":
    main()
