"""Is it the flat part that recites? Controls of the edit, and what fine-tuning brings back.

One K-FAC edit for each model: at 1.05 times the perplexity of tuning text, or at the default energy for images. Then

1. *which part*: instead of the flat components that the edit removes, remove others of the same layers: as many of the
   highest curvature, as many random ones, or high and random ones that hold as much of the weight (squared norm);
2. *put back*: add 25, 50, 75 and 100 % of the removed part again;
3. *fine-tuning*: Adam on all weights, with clean data or with data in which the memorized examples are repeated, from
   the original and from the edited model; ``again`` edits once more at the end, ``projected`` edits after every step.
   For text 96 steps of 8 rows (learning rate 3e-4); for images 10 passes over the training set with right or with given
   labels (3e-4).

Measured on the same data as in ``bench_methods.py``. Mean and sample standard deviation over seeds.

    python benchmarks/bench_controls.py python --models runs/models
    python benchmarks/bench_controls.py digits --models runs/models
    python benchmarks/bench_controls.py tables  # from results into docs/evidence.md
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.base import DEFAULT_ENERGY, Editor
from lightning_curvature.editing.projection import Projection
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.basis import coefficients, project_weight, select_staircase
from support.seeds import Row, run_or_write, seeds_parser
from support.subjects import Subject, Text, columns, subject
from support.tables import by_row, summary

PARTS = ("flat", "high, as many", "random, as many", "high, as much weight", "random, as much weight")
BACK = (0.25, 0.5, 0.75, 1.0)
STEPS = 96


class Remove(WeightEditor):
    """Removes components of the curvature basis: as many as the K-FAC edit does, or as much of the weight."""

    method = "removal"

    def __init__(self, energy: float, part: str, seed: int) -> None:
        super().__init__(energy)
        self.part, self.seed = part, seed

    def project(self, weight, factors, energy):  # noqa: D102
        basis = factors.basis
        C = coefficients(weight, basis)
        columns = select_staircase(basis.lam, basis.mu, energy).columns
        flat = torch.arange(C.shape[1]) >= columns[:, None]
        if self.part == "flat":
            removed = flat
        else:
            mass = torch.outer(basis.lam, basis.mu).flatten()
            generator = torch.Generator().manual_seed(self.seed)
            random = torch.randperm(C.numel(), generator=generator)
            order = mass.argsort(descending=True) if self.part.startswith("high") else random
            count = int(flat.sum())
            if self.part.endswith("weight"):
                held = C.flatten()[order].square().cumsum(0)
                count = int((held < C[flat].square().sum()).sum()) + 1
            removed = torch.zeros(C.numel(), dtype=torch.bool)
            removed[order[:count]] = True
            removed = removed.view_as(C)
        return Projection(project_weight(weight, basis, (~removed).double()), int((~removed).sum()), 1.0)


class PutBack(WeightEditor):
    """Undoes a part of an edit: ``fraction`` of each change of a weight."""

    method = "partly"

    def __init__(self, editor: WeightEditor, fraction: float) -> None:
        super().__init__(editor.energy)
        self.editor, self.fraction = editor, fraction

    def project(self, weight, factors, energy):  # noqa: D102
        edited = self.editor.project(weight, factors, energy)
        return replace(edited, weight=edited.weight + self.fraction * (weight - edited.weight))


def batches(model: Subject, repeats: bool) -> Iterator[Any]:
    """Yield batches to fine-tune on: clean ones, or ones in which memorized examples are repeated."""
    generator = torch.Generator().manual_seed(model.seed)
    if isinstance(model, Text):
        steps = [b for b in model.data.batches if len(b) == 8]
        clean = torch.cat([b for b in model.data.batches if len(b) == 16])
        for i in range(STEPS):
            yield steps[-1 - i] if repeats else clean[torch.randint(len(clean), (8,), generator=generator)][:, :96]
        return
    images, noised, clean = model.data.train.tensors
    for _ in range(10):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            yield images[chosen], (noised if repeats else clean)[chosen]


def tuned(model: Subject, factors: KroneckerFactors, editor: Editor, repeats: bool, how: str) -> Iterator[tuple]:
    """Fine-tune, and yield what is measured at the start, the middle and the end."""
    before = copy.deepcopy(model.model.state_dict())
    if how != "original":
        editor.edit(model.model, factors)
    optimizer = torch.optim.Adam(model.model.parameters(), lr=3e-4)
    rows = list(batches(model, repeats))
    yield "0", model.measure()
    for number, batch in enumerate(rows):
        optimizer.zero_grad()
        model.step(batch).backward()
        optimizer.step()
        if how == "projected":
            editor.edit(model.model, factors)
        if number + 1 in (len(rows) // 6, len(rows)):
            if how == "again" and number + 1 == len(rows):
                editor.edit(model.model, factors)
            yield str(number + 1), model.measure()
    model.model.load_state_dict(before)


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield the results of one seed."""
    model = subject(args.data, seed, args)
    factors = collect(model.model, model.rows, model.step, layers=model.layers, seed=seed)
    energy = model.match(CurvatureEditor(), factors, 1.05, {}) if isinstance(model, Text) else DEFAULT_ENERGY
    yield {"table": "parts", "row": "none", **model.measure()}
    for part in PARTS:
        with Remove(energy, part, seed).applied(model.model, factors):
            yield {"table": "parts", "row": part, **model.measure()}
    editor = CurvatureEditor(energy)
    for fraction in (0.0, *BACK):
        with PutBack(editor, fraction).applied(model.model, factors):
            yield {"table": "back", "row": f"{fraction:.0%} put back", **model.measure()}
    for repeats in (False, True):
        for how in ("original", "edited", "again", "projected"):
            if how in ("again", "projected") and not repeats:
                continue
            data = "memorized repeats" if repeats else "clean data"
            for step, row in tuned(model, factors, editor, repeats, how):
                if step != "0" or (not repeats):
                    yield {"table": "tuning", "row": f"{how}, {data}, {step} steps", **row}


def page(name: str, runs: list[Any]) -> str:
    """Return the tables of one data set."""
    parts = []
    for title, key in (("Which part is removed:", "parts"), ("What is put back:", "back"), ("Fine-tuning:", "tuning")):
        parts += [title, "", summary(by_row(runs, key), columns(name, "setting", "overlap")), ""]
    return "\n".join(parts)


def main() -> None:
    """Run the benchmark, or make its tables."""
    args = seeds_parser(__doc__, ("python", "digits")).parse_args()
    run_or_write("controls", args, results, page, "evidence.md", ("python", "digits"))


if __name__ == "__main__":
    main()
