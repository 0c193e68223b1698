"""Every method at the same perplexity, on small language models that recite: what it leaves, and what it costs.

Protocol, for each seed: the model and the factors of ``bench_recitation.py`` (trained once, and kept in ``--models``);
factors are collected again with ``coupled=True``, and a second pass measures EK-FAC's eigenvalues. Then

- *label-free* edits (scores, soft edits, controls) get the smallest energy that raises the perplexity of clean tuning
  text to at most 1.05 and 1.10 times what it was;
- *supervised* methods see the tuning half of the memorized sequences. The bulk step gets the largest strength, and with
  a K-FAC edit behind it (strength 0.3) the smallest energy, of the same perplexity; the trained ones are run with a few
  settings, of which the one counts that leaves least of the tuning half within the same perplexity (ties: the lower
  perplexity). Their retain set is clean training text and never-memorized text of the sequences' own domain, for
  gradient ascent also clean text alone.

Everything shown is from other data: the validation half of the memorized sequences, a second kind of text that no
method ever saw (*unseen*), the other half of the clean text, and other text of the domain. *seconds* is the time of
making the edit once, with its factors or its training, and without the search of its strength. Mean and sample standard
deviation over seeds.

    python benchmarks/bench_methods.py python --models runs/models --out results/methods-python.json
    python benchmarks/bench_methods.py wikitext --root ../shared/data/text --models runs/models
"""

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from bench_recitation import environment, summary, wikitext

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.baselines import (
    BalancedSubnet,
    GradientAscent,
    NegativePreference,
    RandomBasisEditor,
    SVDEditor,
)
from lightning_curvature.bulk import BulkStepEditor, add_margins
from lightning_curvature.collect import collect
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.demos.settings import TEXT
from lightning_curvature.demos.text import make_data, train_text
from lightning_curvature.editor import Editor
from lightning_curvature.eigenvalues import correct_eigenvalues
from lightning_curvature.text.evaluation import Baseline, perplexity, strict_rate
from lightning_curvature.text.suffixes import Suffixes, suffix_batches, suffix_margins, suffix_nll

LIMITS = (1.05, 1.10)
LAST = ["*.2.mlp.[gu]*", "*.3.mlp.[gu]*"]
LABEL_FREE: dict[str, Callable[..., Editor]] = {
    "K-FAC": CurvatureEditor,
    "K-FAC, last two blocks, gate and up": partial(CurvatureEditor, layers=LAST),
    "EK-FAC": partial(CurvatureEditor, score="ekfac"),
    "coupled": partial(CurvatureEditor, score="coupled"),
    "saliency": partial(CurvatureEditor, score="saliency"),
    "activations only": partial(CurvatureEditor, score="activations"),
    "K-FAC, soft": partial(CurvatureEditor, soft=True),
    "activations only, soft": partial(CurvatureEditor, score="activations", soft=True),
    "SVD": SVDEditor,
    "random basis": RandomBasisEditor,
}
TRAINED = {
    "BalancedSubnet": [
        partial(BalancedSubnet, ratio=0.05, weight=0.1, epochs=10, lr=0.01),
        partial(BalancedSubnet, ratio=0.05, weight=0.02, epochs=10, lr=0.01),
        partial(BalancedSubnet, ratio=0.02, weight=0.05, epochs=10, lr=0.01),
    ],
    "gradient ascent": [
        partial(GradientAscent, weight=0.1, epochs=5, lr=1e-3),
        partial(GradientAscent, weight=0.3, epochs=5, lr=3e-4),
    ],
    "NPO": [
        partial(NegativePreference, weight=0.1, epochs=10, lr=1e-3),
        partial(NegativePreference, weight=0.3, epochs=10, lr=3e-4),
    ],
}
COLUMNS = {
    "setting": ("setting", 1, 2),
    "strict": ("strict", 100, 1),
    "unseen": ("unseen strict", 100, 1),
    "times": ("perplexity, times", 1, 3),
    "domain": ("domain, times", 1, 3),
    "overlap": ("ranking overlap", 100, 1),
    "seconds": ("seconds", 1, 0),
}


class Trial:
    """One trained model and what is measured on it."""

    def __init__(self, seed: int, data: RecitedText, folder: Path) -> None:
        self.data = data
        self.model = self._model(seed, folder)
        self.lm = self.model.model
        clean = data.held_out["clean"]
        self.tuning = clean["tuning"][:100]
        self.before = {"tuning": perplexity(self.lm, self.tuning), "clean": perplexity(self.lm, clean["report"]),
                       "domain": perplexity(self.lm, data.held_out["domain"]["report"])}  # fmt: skip
        self.baseline = Baseline(self.lm, clean["report"])

    def _model(self, seed: int, folder: Path) -> LitCausalLM:
        saved = folder / "model.pt"
        if not saved.exists():
            folder.mkdir(parents=True, exist_ok=True)
            model, _, _ = train_text(folder, seed, TEXT, self.data)
            torch.save(model.state_dict(), saved)
        model = LitCausalLM(TEXT.vocab_size, TEXT.hidden, 4 * TEXT.hidden, TEXT.layers)
        model.load_state_dict(torch.load(saved, weights_only=True))
        return model.eval()

    def factors(self, seed: int) -> tuple[KroneckerFactors, dict[str, float]]:
        """Collect factors with everything that a score may need, and return the seconds of each part."""
        rows = torch.split(self.data.collected, 16)

        def step(batch):
            return self.lm(input_ids=batch, labels=batch).loss

        seconds = {}
        started = time.perf_counter()
        factors = collect(self.model, rows, step, layers="mlp", seed=seed)
        seconds["collect"] = time.perf_counter() - started
        factors = collect(self.model, rows, step, layers="mlp", seed=seed, coupled=True)
        started = time.perf_counter()
        factors = correct_eigenvalues(self.model, factors, rows, step, seed=seed + 1)
        seconds["correct"] = time.perf_counter() - started
        started = time.perf_counter()
        forget = suffix_batches(self.lm, self.data.half("tuning"))
        factors = add_margins(self.model, factors, forget, lambda batch: suffix_margins(self.lm, batch))
        seconds["margins"] = time.perf_counter() - started
        return factors, seconds

    def ratio(self, editor: Editor, factors: KroneckerFactors) -> float:
        """Return the perplexity of the tuning text under an edit, as a multiple."""
        with editor.applied(self.model, factors):
            return perplexity(self.lm, self.tuning) / self.before["tuning"]

    def measure(self, editor: Editor, factors: KroneckerFactors) -> dict[str, float]:
        """Return what is shown of an edit."""
        started = time.perf_counter()
        with editor.applied(self.model, factors):
            seconds = time.perf_counter() - started
            both = self.baseline.evaluate(self.lm)
            return {
                "tuning": strict_rate(self.lm, self.data.half("tuning")),
                "strict": strict_rate(self.lm, self.data.half("validation")),
                "unseen": strict_rate(self.lm, self.data.unseen),
                "times": both["perplexity"] / self.before["clean"],
                "domain": perplexity(self.lm, self.data.held_out["domain"]["report"]) / self.before["domain"],
                "overlap": both["ranking_overlap"],
                "seconds": seconds,
            }

    def retain(self, domain: bool) -> list[Suffixes]:
        """Return batches of clean text, half of each from the domain if asked for."""
        clean, own = self.data.collected, self.data.held_out["domain"]["tuning"]
        if not domain:
            return [Suffixes(rows, 1) for rows in torch.split(clean[:400], 16)]
        return [Suffixes(torch.cat([clean[8 * i : 8 * i + 8], own[(8 * i) % (len(own) - 8) :][:8]]), 1)
                for i in range(25)]  # fmt: skip


def bisect(ratio: Callable[[float], float], limit: float, low: float, high: float, falling: bool) -> float:
    """Return the setting between two bounds whose perplexity is ``limit``: it falls, or rises, with the setting."""
    for _ in range(8):
        middle = (low + high) / 2
        allowed = ratio(middle) <= limit  # not-a-number is more than allowed
        low, high = (low, middle) if allowed == falling else (middle, high)
    return high if falling else low


def rows(trial: Trial, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the rows of the table."""
    factors, spent = trial.factors(seed)
    yield "none", trial.measure(CurvatureEditor(1.0), factors)
    bulk = partial(BulkStepEditor, bulk=0.9)
    for limit in LIMITS:
        for name, make in LABEL_FREE.items():
            energy = bisect(lambda e, make=make: trial.ratio(make(e), factors), limit, 0.0, 1.0, falling=True)
            row = trial.measure(make(energy), factors)
            needs = {"EK-FAC": spent["collect"] + spent["correct"], "SVD": 0.0, "random basis": 0.0}
            row["seconds"] += needs.get(name, spent["collect"])
            yield f"{name} ({limit:g})", {"setting": energy, **row}
        strength = bisect(lambda s: trial.ratio(bulk(s), factors), limit, 0.1, 2.0, falling=False)
        row = trial.measure(bulk(strength), factors)
        row["seconds"] += spent["collect"] + spent["margins"]
        yield f"bulk step ({limit:g})", {"setting": strength, **row}
        energy = bisect(lambda e: trial.ratio(bulk(0.3, energy=e), factors), limit, 0.3, 1.0, falling=True)
        row = trial.measure(bulk(0.3, energy=energy), factors)
        row["seconds"] += spent["collect"] + spent["margins"]
        yield f"bulk step and K-FAC ({limit:g})", {"setting": energy, **row}
    forget = list(suffix_batches(trial.lm, trial.data.half("tuning"), 16))

    def loss(module, batch):
        return suffix_nll(module.model, batch)

    def chosen(settings, retain):
        found = []
        for number, make in enumerate(settings):
            row = {"setting": float(number), **trial.measure(make(forget, retain, loss), factors)}
            found.append((row["tuning"], row["times"], row))
        within = [entry for entry in found if entry[1] <= LIMITS[0]] or [min(found, key=lambda entry: entry[1])]
        return min(within, key=lambda entry: entry[:2])[2]

    for name, settings in TRAINED.items():
        yield name, chosen(settings, trial.retain(domain=True))
    yield "gradient ascent, clean retain set", chosen(TRAINED["gradient ascent"], trial.retain(domain=False))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=["wikitext", "python"])
    parser.add_argument("--root", type=Path, help="folder with the files of WikiText-2 and the recited Dolma texts")
    parser.add_argument("--models", type=Path, default=Path("runs/models"), help="folder for the trained models")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file for all numbers, written after each seed")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    runs = []
    for seed in range(args.seeds):
        data = wikitext(seed, args.root) if args.data == "wikitext" else make_data(seed, TEXT)
        run = {}
        runs.append(run)
        for name, row in rows(Trial(seed, data, args.models / f"{args.data}-{seed}"), seed):
            run[name] = row
            print(f"seed {seed} {name}: { ({key: round(value, 3) for key, value in row.items()}) }", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"environment": environment(), "runs": runs}, indent=1))
    print(f"\n{args.data}, {args.seeds} seeds\n\n{summary(runs, COLUMNS)}")


if __name__ == "__main__":
    main()
