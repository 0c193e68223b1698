"""Every method at the same utility: what it leaves, what it needs, and what it costs.

Subjects, three seeds each: ``python`` and ``wikitext``, the language models of ``bench_recitation.py``; ``digits`` and
``mnist``, the ViTs of ``bench_label_noise.py``. They are trained once and kept in ``--models``. Factors come from one
pass over the frozen model; a second pass measures the eigenvalues of EK-FAC.

Limits: the perplexity of clean *tuning* text may become 1.02, 1.05, 1.10 and 1.20 times what it was; the validation
accuracy of the *tuning* part 1.00, 0.99 and 0.97 times. Each method gets the strongest setting within each limit:

- *label-free* edits the smallest energy; controls (SVD, random basis) likewise;
- *supervised* methods see the tuning half of what is memorized. The bulk step gets the largest strength; with a soft
  edit behind it the strength stays 0.4, and it gets the smallest energy. The trained ones are run with a few settings
  each; of those within the limit that one counts that leaves least of the tuning half, and of equals the one that uses
  most of the limit. Their retain set is clean training text and never-memorized text of the sequences' own domain
  (for gradient ascent also clean text alone), or training images whose labels are right.

Everything shown is from other data: the validation half of the memorized sequences, a second kind of text that no
method ever saw (*unseen*), other clean text, other text of the domain; the report part of images and labels. Mean and
sample standard deviation over seeds. ``--costs`` measures what it takes to make each edit once, factors or training and
all, without the search of its setting, in a process with nothing else to do; memory is the peak beyond what it held.

    python benchmarks/bench_methods.py python --models runs/models
    python benchmarks/bench_methods.py wikitext --root ../shared/data/text --models runs/models
    python benchmarks/bench_methods.py digits --models runs/models
    python benchmarks/bench_methods.py mnist --root ../shared/data --models runs/models
    python benchmarks/bench_methods.py python --costs --seeds 1 --models runs/models
    python benchmarks/bench_methods.py digits --costs --models runs/models
    python benchmarks/bench_methods.py tables  # from results into docs/methods.md
"""

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lightning_curvature import CurvatureEditor
from lightning_curvature.baselines import (
    BalancedSubnet,
    GradientAscent,
    NegativePreference,
    RandomBasisEditor,
    SVDEditor,
)
from lightning_curvature.editing.base import Editor
from lightning_curvature.editing.bulk import BulkStepEditor
from lightning_curvature.editing.report import EditReport
from support.costs import measured
from support.seeds import Row, run, seeds_parser, write_sections
from support.subjects import IMAGES, Images, Subject, Text, collected, subject
from support.tables import Columns, mean, summary, table
from support.texts import TEXTS

FACTORS = ("collect", "decompose")
LABEL_FREE = {
    "K-FAC": (CurvatureEditor(), "data", FACTORS),
    "K-FAC, gate and up of the last two blocks": (None, "data", FACTORS),
    "EK-FAC": (CurvatureEditor(score="ekfac"), "data, twice", (*FACTORS, "correct")),
    "coupled": (CurvatureEditor(score="coupled"), "data", ("coupled", "decompose")),
    "saliency": (CurvatureEditor(score="saliency"), "data", FACTORS),
    "activations only": (CurvatureEditor(score="activations"), "data", FACTORS),
    "K-FAC, soft": (CurvatureEditor(soft=True), "data", FACTORS),
    "activations only, soft": (CurvatureEditor(score="activations", soft=True), "data", FACTORS),
    "SVD": (SVDEditor(), "nothing", ()),
    "random basis": (RandomBasisEditor(), "nothing", ()),
}
TRAINED = {
    "BalancedSubnet": [
        partial(BalancedSubnet, ratio=0.02, weight=0.1, epochs=10, lr=0.01),
        partial(BalancedSubnet, ratio=0.05, weight=0.1, epochs=10, lr=0.01),
        partial(BalancedSubnet, ratio=0.1, weight=0.3, epochs=10, lr=0.01),
        partial(BalancedSubnet, ratio=0.2, weight=0.1, epochs=10, lr=0.01),
    ],
    "gradient ascent": [
        partial(GradientAscent, weight=0.1, epochs=5, lr=1e-3),
        partial(GradientAscent, weight=0.3, epochs=5, lr=3e-4),
        partial(GradientAscent, weight=0.5, epochs=5, lr=3e-4),
    ],
    "NPO": [
        partial(NegativePreference, weight=0.1, epochs=10, lr=1e-3),
        partial(NegativePreference, weight=0.3, epochs=10, lr=3e-4),
        partial(NegativePreference, weight=0.3, epochs=10, lr=1e-3),
    ],
}
STRENGTH = 0.4
COMBINATION = "bulk step, then activations only, soft"
FORGET, BOTH = "forget set, data", "forget set, retain set"
SUPERVISED = {
    "bulk step": FORGET,
    COMBINATION: FORGET,
    "BalancedSubnet": BOTH,
    "gradient ascent": BOTH,
    "NPO": BOTH,
    "gradient ascent, clean retain set": BOTH,
}
COSTS: Columns = {"seconds": ("seconds", 1, 1), "memory": ("memory, MiB", 1, 0), "passes": ("backward passes", 1, 0)}


class Strength:
    """Looks like an editor with an energy: the lower it is, the longer the bulk step."""

    def at(self, energy: float) -> Editor:
        """Return the editor of an energy."""
        return BulkStepEditor(2.0 * (1 - energy))


class Trained(Editor):
    """Weights that were trained once."""

    def __init__(self, weights: Mapping[str, torch.Tensor], report: EditReport) -> None:
        super().__init__(1.0)
        self.result = dict(weights), report

    def edited_weights(self, module, factors):  # noqa: ARG002, D102
        return self.result


def editors(model: Subject) -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """Yield the methods whose strength can be searched for, and the parts of collecting that they need."""
    for name, (editor, _, needs) in LABEL_FREE.items():
        if editor is not None or model.last is not None:
            yield name, editor or CurvatureEditor(layers=model.last), needs
    yield "bulk step", Strength(), (*FACTORS, "margins")
    yield COMBINATION, BulkStepEditor(STRENGTH, score="activations", soft=True), (*FACTORS, "margins")


def rivals(model: Subject) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Yield the methods that train, their settings and retain sets."""
    for name, settings in TRAINED.items():
        yield name, settings, model.retain()
    if isinstance(model, Text):
        yield "gradient ascent, clean retain set", TRAINED["gradient ascent"], model.retain(domain=False)


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield what is left by each method within each limit."""
    model = subject(args.data, seed, args)
    factors, _ = collected(model)
    yield {"method": "none", "limit": None, **model.measure()}
    for name, editor, _ in editors(model):
        points: dict[float, float] = {}
        for limit in model.limits:
            energy = model.match(editor, factors, limit, points)
            with editor.at(energy).applied(model.model, factors):
                yield {"method": name, "limit": limit, "setting": energy, **model.measure()}
    before, sign = model.utility(), -1 if model.higher_is_better else 1
    for name, settings, retain in rivals(model):
        trials = []
        for number, make in enumerate(settings):
            editor = Trained(*make(model.forget, retain, model.losses).edited_weights(model.model, factors))
            with editor.applied(model.model, factors):
                utility = model.utility() / before
                row = {"setting": float(number), **model.measure()}
                trials.append((model.tuning_rate(), -sign * utility, row))
        for limit in model.limits:
            allowed = [entry for entry in trials if -entry[1] <= sign * limit]
            if allowed:
                yield {"method": name, "limit": limit, **min(allowed, key=lambda entry: entry[:2])[2]}


def costs(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield what it costs to make each edit once, of trained methods with the first setting."""
    model = subject(args.data, seed, args)
    factors, parts = collected(model)
    for name, editor, needs in editors(model):
        with measured() as cost:
            editor.at(0.85).edited_weights(model.model, factors)
        yield {"method": name, **dataclasses.asdict(sum((parts[part] for part in needs), cost))}
    for name, settings, retain in rivals(model):
        with measured() as cost:
            settings[0](model.forget, retain, model.losses).edited_weights(model.model, factors)
        yield {"method": name, **dataclasses.asdict(cost)}


def page(name: str, runs: Sequence[Any]) -> str:
    """Return the tables of one data set."""
    kind = Text if name in TEXTS else Images
    methods = list(dict.fromkeys(row["method"] for run in runs for row in run))
    title, scale, digits = kind.columns[kind.main]

    def at(limit):
        return [
            {row["method"]: row for row in run if row["limit"] in (limit, None) and kind.main in row} for run in runs
        ]

    def left(method):
        for limit in kind.limits:
            values = [scale * run[method][kind.main] for run in at(limit) if method in run]
            yield mean(values, len(runs), digits)

    headers = [f"{title} at {kind.utility_name}, times", *(f"{limit:g}" for limit in kind.limits)]
    parts = [table([[method, *left(method)] for method in methods], headers)]
    for limit in kind.limits:
        heading = f"All that was measured at {limit:g} times the {kind.utility_name}:"
        parts += ["", heading, "", summary(at(limit), kind.columns)]
    return "\n".join(parts)


def cost_page(_data: str, runs: Sequence[Any]) -> str:
    """Return the table of what the methods need and cost."""
    needs = {name: needs for name, (_, needs, _) in LABEL_FREE.items()} | SUPERVISED
    rows = [{row["method"]: row for row in run} for run in runs]
    body = [
        [m, needs[m], *(mean([row[m][key] for row in rows], len(runs), d) for key, (_, _, d) in COSTS.items())]
        for m in rows[0]
    ]
    return table(body, ["", "needs", *(title for title, _, _ in COSTS.values())])


def main() -> None:
    """Run the benchmark, or make its tables."""
    arguments = seeds_parser(__doc__, (*TEXTS, *IMAGES))
    arguments.add_argument("--costs", action="store_true", help="measure what the methods cost instead")
    args = arguments.parse_args()
    if args.data == "tables":
        write_sections("methods", (*TEXTS, *IMAGES), "methods.md", page)
        write_sections("costs", ("python", "digits"), "methods.md", cost_page)
    elif args.costs:
        print(cost_page(args.data, run("costs", args, costs)))
    else:
        print(page(args.data, run("methods", args, results)))


if __name__ == "__main__":
    main()
