"""Every method at the same utility: what it leaves, what it needs, and what it costs.

Subjects, three seeds each: ``python`` and ``wikitext``, the language models of ``bench_recitation.py``; ``digits`` and
``mnist``, the ViTs of ``bench_label_noise.py``. They are trained once and kept in ``--models``. Factors come from one
pass over the frozen model; a second pass measures the eigenvalues of EK-FAC.

Limits: the perplexity of clean *tuning* text may become 1.02, 1.05, 1.10 and 1.20 times what it was; the validation
accuracy of the *tuning* part 1.00, 0.99 and 0.97 times. Each method gets the strongest setting within each limit:

- *label-free* edits the smallest energy; controls (SVD, random basis) likewise;
- *supervised* methods see the tuning half of what is memorized. The bulk step gets the largest strength; with a soft
  edit behind it the strength stays 0.15, and it gets the smallest energy. The trained ones are run with a few settings
  each; of those within the limit that one counts that leaves least of the tuning half, and of equals the one that uses
  most of the limit. Their retain set is clean training text and never-memorized text of the sequences' own domain
  (for gradient ascent also clean text alone), or training images whose labels are right.

Everything shown is from other data: the validation half of the memorized sequences, a second kind of text that no
method ever saw (*unseen*), other clean text, other text of the domain; the report part of images and labels. Costs: of
making the edit once, factors or training and all, without the search of its setting; memory is the peak beyond what the
process held before. Mean and sample standard deviation over seeds.

    python benchmarks/bench_methods.py python --models runs/models
    python benchmarks/bench_methods.py wikitext --root ../shared/data/text --models runs/models
    python benchmarks/bench_methods.py digits --models runs/models
    python benchmarks/bench_methods.py mnist --root ../shared/data --models runs/models
    python benchmarks/bench_methods.py tables  # from results into docs/methods.md
"""

import argparse
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from subjects import Images, Subject, Text, collected, subjects
from tables import Cost, environment, mean, measured, replace_section, summary, table

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.baselines import (
    BalancedSubnet,
    GradientAscent,
    NegativePreference,
    RandomBasisEditor,
    SVDEditor,
)
from lightning_curvature.bulk import BulkStepEditor
from lightning_curvature.editor import Editor
from lightning_curvature.report import EditReport

HERE = Path(__file__).parent
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
STRENGTH = 0.15
COSTS = {"seconds": ("seconds", 1, 1), "memory": ("memory, MiB", 1, 0), "passes": ("backward passes", 1, 0)}

Row = dict[str, float]


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


def rows(subject: Subject) -> Iterator[tuple[str, float | None, Row]]:
    """Yield what is left by each method within each limit (None: what the method needs and costs)."""
    factors, parts = collected(subject)
    yield "none", None, subject.measure()

    def within(name: str, editor, needs: tuple[str, ...]):
        with measured() as own:
            editor.at(0.85).edited_weights(subject.model, factors)
        yield name, None, dataclasses.asdict(sum((parts[part] for part in needs), own))
        points: dict[float, float] = {}
        for limit in subject.limits:
            energy = subject.match(editor, factors, limit, points)
            with editor.at(energy).applied(subject.model, factors):
                yield name, limit, {"setting": energy, **subject.measure()}

    for name, (editor, _, needs) in LABEL_FREE.items():
        if editor is None and subject.last is None:
            continue
        yield from within(name, editor or CurvatureEditor(layers=subject.last), needs)
    yield from within("bulk step", Strength(), (*FACTORS, "margins"))
    both = BulkStepEditor(STRENGTH, score="activations", soft=True)
    yield from within("bulk step, then activations only, soft", both, (*FACTORS, "margins"))
    yield from trained(subject, factors)


def trained(subject: Subject, factors: KroneckerFactors) -> Iterator[tuple[str, float | None, Row]]:
    """Yield the rows of methods that train."""
    sets = {name: (settings, subject.retain()) for name, settings in TRAINED.items()}
    if isinstance(subject, Text):
        sets["gradient ascent, clean retain set"] = (TRAINED["gradient ascent"], subject.retain(domain=False))
    before, sign = subject.utility(), -1 if subject.higher_is_better else 1
    for name, (settings, retain) in sets.items():
        found, costs = [], Cost()
        for number, make in enumerate(settings):
            with measured() as cost:
                editor = Trained(*make(subject.forget, retain, subject.losses).edited_weights(subject.model, factors))
            costs = max(costs, cost, key=lambda c: c.seconds)
            with editor.applied(subject.model, factors):
                utility = subject.utility() / before
                row = {"setting": float(number), **subject.measure()}
                found.append((subject.tuning_rate(), -sign * utility, row))
        yield name, None, dataclasses.asdict(costs)
        for limit in subject.limits:
            allowed = [entry for entry in found if -entry[1] <= sign * limit]
            if allowed:
                yield name, limit, min(allowed, key=lambda entry: entry[:2])[2]


def run(args: argparse.Namespace) -> None:
    """Run the benchmark, seed by seed; go on where an earlier run stopped."""
    done = json.loads(args.out.read_text())["runs"] if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seeds = [seed for seed in range(args.seeds) if str(seed) not in done]
    for seed, subject in subjects(args.data, iter(seeds), args.models, args.root):
        results = []
        for name, limit, row in rows(subject):
            results.append({"method": name, "limit": limit, **{key: round(value, 4) for key, value in row.items()}})
            print(seed, results[-1], flush=True)
        done[str(seed)] = results
        args.out.write_text(json.dumps({"environment": environment(), "runs": done}, indent=1))


def page(name: str, results: Mapping[str, Sequence[Row]]) -> str:
    """Return the tables of one data set."""
    kind = Text if name in ("python", "wikitext") else Images
    runs = list(results.values())
    methods = list(dict.fromkeys(row["method"] for run in runs for row in run))
    title, scale, digits = kind.columns[kind.main]

    def at(limit):
        return [{row["method"]: row for row in run if row["limit"] in (limit, None) and kind.main in row}
                for run in runs]  # fmt: skip

    def left(method):
        for limit in kind.limits:
            values = [scale * run[method][kind.main] for run in at(limit) if method in run]
            yield mean(values, len(runs), digits)

    word = f"{kind.utility_name}, times"
    overview = table([[m, *left(m)] for m in methods], [f"{title} at {word}", *(f"{limit:g}" for limit in kind.limits)])
    costs = [{row["method"]: row for row in run if row["limit"] is None and "seconds" in row} for run in runs]
    parts = [overview, "", "What they cost:", "", summary(costs, COSTS)]
    for limit in kind.limits:
        parts += ["", f"All that was measured at {limit:g} times the {kind.utility_name}:", "",
                  summary(at(limit), kind.columns)]  # fmt: skip
    return "\n".join(parts)


def tables(results: Path, docs: Path) -> None:
    """Write the tables of all results into a page."""
    for name in ("python", "wikitext", "digits", "mnist"):
        found = json.loads((results / f"methods-{name}.json").read_text())
        facts = ", ".join(f"{key} {value}" for key, value in found["environment"].items())
        text = f"\n{page(name, found['runs'])}\n\n{len(found['runs'])} seeds; {facts}\n"
        replace_section(docs, f"methods-{name}", text)


def main() -> None:
    """Run the benchmark, or make its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["python", "wikitext", "digits", "mnist", "tables"])
    parser.add_argument("--root", type=Path, help="folder with WikiText-2 and the Dolma texts, or with MNIST/raw")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="folder for the trained models")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file; by default benchmarks/results/methods-DATA.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    args.out = args.out or HERE / "results" / f"methods-{args.data}.json"
    if args.data == "tables":
        tables(HERE / "results", HERE.parent / "docs" / "methods.md")
        return
    run(args)
    print(page(args.data, json.loads(args.out.read_text())["runs"]))


if __name__ == "__main__":
    main()
