"""What else sits in the spectrum: skills of a small language model under the edit, and what goes with losing them.

Protocol, for each seed: a small ``Olmo2ForCausalLM`` is trained from scratch on a generated mixture
(``support/mixture.py``): English, boolean logic, look-up in the prompt, facts of three frequencies, two-digit addition,
and 128 sequences of text that it comes to recite. Every skill must be above 90 % before the edit; logic and sums are
asked on items that were never trained on. Factors of all MLP layers come from rows as in training, without the repeated
sequences (*mixture*), and from the English rows among them alone (*text*). Then

1. *skills*: accuracy before, chance, entropy of the answers (nats), their mean log frequency in training, and the mean
   entropy of the model's prediction;
2. *retained*: the share of each skill above chance that is left where the edit first costs a multiple of the
   perplexity of held-out English; *energies*: the same by energy;
3. *bands*: how strongly the positions that predict answers use the bands of the spectrum, over ordinary English, with
   unit vectors; geometric mean over layers;
4. *with the loss*: rank correlation between the loss of log probability of each answer, at perplexity x 1.1, and the
   leaning of its activations (log of the strength in the bottom band over that in the top band, mean over layers),
   alone and with controls: the log frequency of the answer's tokens, the entropy of the model's prediction before the
   edit, and the entropy of the answers of its task. Over all items, within each task, and between the means of tasks;
5. *order*: differences in what is retained between neighbours in the order logic, open book, facts, arithmetic,
   verbatim (arXiv:2510.24256, section 6), and between frequent and rare facts, with a 95 % interval over seeds
   (Student's t).

Mean and sample standard deviation over seeds.

    python benchmarks/bench_tasks.py mixture --models runs/models
    python benchmarks/bench_tasks.py tables  # from results into docs/analysis.md and docs/tasks.png
"""

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

import lightning.pytorch as pl
import torch
from scipy import stats
from torch import Tensor

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis import SkillRetention, layer_activations, rank_correlation, skill_retention
from lightning_curvature.analysis.bands import LABELS, band_strengths
from lightning_curvature.collect.passes import collect
from lightning_curvature.report.plots import save
from lightning_curvature.text.evaluation import perplexity
from lightning_curvature.text.matching import match_perplexity
from lightning_curvature.text.sequences import PromptedSequence, batches
from lightning_curvature.text.suffixes import suffix_batches, suffix_logits
from support.mixture import CHANCE, Mixture, Student
from support.seeds import Row, read, run, seeds_parser
from support.tables import DOCS, all_tables, by_row, replace_section, table

ENERGIES = (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)
MULTIPLES = (1.05, 1.1, 1.2, 1.5)
MATCHED = 1.1
"""Perplexity, in multiples, at which items are compared and the order is tested first."""
LEARNED = 0.9
WIDTH, LR = 192, 2e-3
POPULATIONS = ("mixture", "text")
ORDER = ("logic", "open book", "facts", "arithmetic", "verbatim")

Asked = Mapping[str, Sequence[PromptedSequence]]


def trained(data: Mixture, seed: int, folder: Path) -> Student:
    """Return the model of a seed, trained unless it is there already."""
    pl.seed_everything(seed, verbose=False)
    decay = 0.6 * (len(data.batches) - data.steps) / len(data.batches)
    model = Student(hidden=WIDTH, intermediate=4 * WIDTH, lr=LR, decay=decay)
    saved = folder / f"mixture-{seed}" / "model.pt"
    if not saved.exists():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            precision="bf16-mixed",
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        saved.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), saved)
    model.load_state_dict(torch.load(saved, weights_only=True))
    return model.eval()


def answers(model: Student, sequences: Sequence[PromptedSequence]) -> dict[str, Tensor]:
    """Return what is said of each item, in batches of equal lengths; log probability and entropy in nats per token."""
    measures: dict[str, list[Tensor]] = {"right": [], "log probability": [], "entropy": []}
    with torch.no_grad():
        for batch in suffix_batches(model.model, sequences):
            logits, target = suffix_logits(model.model, batch)
            log = logits.double().log_softmax(-1)
            measures["right"].append((logits.argmax(-1) == target).all(1).double())
            measures["log probability"].append(log.gather(-1, target[..., None]).squeeze(-1).mean(1))
            measures["entropy"].append(-(log.exp() * log).sum(-1).mean(1))
    return {name: torch.cat(parts) for name, parts in measures.items()}


def measured(model: Student, asked: Asked, windows: Tensor) -> dict[str, float]:
    """Return the accuracy in each skill, and the perplexity of held-out English."""
    accuracy = {name: float(answers(model, sequences)["right"].mean()) for name, sequences in asked.items()}
    return accuracy | {"perplexity": perplexity(model.model, windows)}


def strengths(model: Student, factors: KroneckerFactors, sequences: Sequence[PromptedSequence]) -> Tensor:
    """Return how strongly the positions that predict answers use each band, ``[layers, items, bands]``."""
    parts = [
        banded(model, factors, batch.ids[:, :-1], slice(batch.start - 1, None))
        for batch in suffix_batches(model.model, sequences, 64)
    ]
    return torch.cat(parts, 1)


def banded(model: Student, factors: KroneckerFactors, ids: Tensor, positions: slice) -> Tensor:
    """Return how strongly rows of tokens use each band at some positions."""
    modules = dict(model.named_modules())
    inputs = layer_activations(
        model, torch.split(ids, 64), lambda rows: model.model(input_ids=rows, use_cache=False), list(factors), positions
    )
    return torch.stack(
        [band_strengths(modules[name].weight.detach(), factors[name], inputs[name], normalize=True) for name in factors]
    )


def described(asked: Asked, counts: Counter[int]) -> dict[str, tuple[float, Tensor]]:
    """Return, by task, the entropy of its answers' tokens (nats), and each answer's mean log frequency of tokens."""
    total, facts = sum(counts.values()), {}
    for name, sequences in asked.items():
        tokens = Counter(token for sequence in sequences for token in sequence.suffix_ids)
        probability = torch.tensor(list(tokens.values()), dtype=torch.float64) / tokens.total()
        ordered = [sequences[index] for group in batches(sequences, 32) for index in group]
        frequency = [fmean(math.log((1 + counts[t]) / total) for t in s.suffix_ids) for s in ordered]
        entropy = float(-(probability * probability.log()).sum())
        facts[name] = entropy, torch.tensor(frequency, dtype=torch.float64)
    return facts


def population(data: Mixture, kind: str) -> Tensor:
    """Return the rows that factors are collected on: as in training, or the English ones among them."""
    return data.collected if kind == "mixture" else data.collected[::4]


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield the results of one seed."""
    data = Mixture(seed)
    model = trained(data, seed, args.models)
    asked, held = data.asked(), data.text.held_out["clean"]
    about = described(asked, Counter(torch.cat([batch.flatten() for batch in data.batches]).tolist()))
    before = {name: answers(model, sequences) for name, sequences in asked.items()}
    for name, measures in before.items():
        accuracy, (entropy, frequency) = float(measures["right"].mean()), about[name]
        yield {
            "table": "skills",
            "row": name,
            "accuracy": accuracy,
            "chance": CHANCE[name],
            "answer entropy": entropy,
            "log frequency": float(frequency.mean()),
            "predicted entropy": float(measures["entropy"].mean()),
        }
        if accuracy < LEARNED:
            raise RuntimeError(f"seed {seed}: {name} is at {accuracy:.3f} before the edit; the recipe must teach it.")
    for kind in POPULATIONS:
        rows = population(data, kind)
        factors = collect(
            model, torch.split(rows, 16), lambda batch: model.training_step(batch, 0), layers="mlp", seed=seed
        )
        editor = CurvatureEditor()
        curves = skill_retention(
            model, factors, editor, ENERGIES, partial(measured, model, asked, held["report"]), CHANCE
        )
        yield from left_of_skills(curves, kind)
        yield from leanings(model, factors, asked, before, about, held, kind)


def left_of_skills(curves: SkillRetention, kind: str) -> Iterator[Row]:
    """Yield what edits leave of each skill, at each perplexity that they reach."""
    groups = {**{name: [name] for name in curves.chance}, "facts": [n for n in curves.chance if n.startswith("facts")]}
    left = {multiple: curves.at_perplexity(multiple) for multiple in MULTIPLES if multiple <= max(curves.perplexity)}
    for name, members in groups.items():
        retained = {f"x {multiple}": fmean(skills[member] for member in members) for multiple, skills in left.items()}
        yield {"table": f"retained, {kind}", "row": name, **retained}
    for place, energy in enumerate(curves.energies):
        multiple = {"perplexity, times": curves.perplexity[place]}
        by_skill = {name: curves.retained(name)[place] for name in curves.chance}
        yield {"table": f"energies, {kind}", "row": f"{energy:g}", **multiple, **by_skill}


def leanings(
    model: Student,
    factors: KroneckerFactors,
    asked: Asked,
    before: Mapping[str, Mapping[str, Tensor]],
    about: Mapping[str, tuple[float, Tensor]],
    held: Mapping[str, Tensor],
    kind: str,
) -> Iterator[Row]:
    """Yield the strength of each skill in each band, and how it goes with the loss of log probability."""
    editor = CurvatureEditor()
    match = match_perplexity(model.model, factors, editor, held["tuning"], MATCHED, module=model)
    with editor.at(match.energy).applied(model, factors):
        after = {name: answers(model, sequences)["log probability"] for name, sequences in asked.items()}
    english = banded(model, factors, held["report"][:64, :-1], slice(None)).mean(1)
    lost, lean, controls = {}, {}, {}
    bottom, drops = [], []
    for name, sequences in asked.items():
        strength = strengths(model, factors, sequences)
        ratio = (strength.mean(1) / english).log().mean(0).exp().tolist()
        entropy, frequency = about[name]
        lost[name] = before[name]["log probability"] - after[name]
        lean[name] = (strength[..., -1] / strength[..., 0]).log().mean(0)
        controls[name] = torch.stack([frequency, before[name]["entropy"], torch.full_like(frequency, entropy)])
        bottom.append(ratio[-1])
        drops.append(float(lost[name].mean()))
        yield {"table": f"bands, {kind}", "row": name, **dict(zip(LABELS, ratio, strict=True)), "nats lost": drops[-1]}
    all_items = [torch.cat([values[name] for name in asked], -1) for values in (lost, lean, controls)]
    for name, (drop, leaning, known) in {
        "all items": all_items,
        **{name: (lost[name], lean[name], controls[name][:2]) for name in asked},
    }.items():
        varied = [control for control in known if control.std() > 0]
        yield {
            "table": f"with the loss, {kind}",
            "row": name,
            "leaning": rank_correlation(drop, leaning),
            "leaning, controlled": rank_correlation(drop, leaning, varied),
            "frequency": rank_correlation(drop, known[0]),
            "entropy": rank_correlation(drop, known[1]),
        }
    yield {"table": f"with the loss, {kind}", "row": "means of tasks", "leaning": rank_correlation(drops, bottom)}


def intervals(runs: Sequence[Sequence[Row]], kind: str) -> str:
    """Return differences in what is retained, with 95 % intervals over seeds, as a table."""
    retained = by_row(runs, f"retained, {kind}")
    body = []
    for more, less in (*pairwise(ORDER), ("logic", "verbatim"), ("facts, frequent", "facts, rare")):
        cells = [f"{more} - {less}"]
        for multiple in MULTIPLES:
            column = f"x {multiple}"
            gaps = [rows[more][column] - rows[less][column] for rows in retained if column in rows[more]]
            if len(gaps) < 2:
                cells.append("")
                continue
            reach = stats.t.ppf(0.975, len(gaps) - 1) * stdev(gaps) / len(gaps) ** 0.5
            middle = fmean(gaps)
            verdict = "holds" if middle - reach > 0 else "reversed" if middle + reach < 0 else "open"
            cells.append(f"{middle:+.2f} ({middle - reach:+.2f} to {middle + reach:+.2f}): {verdict}")
        body.append(cells)
    return table(body, ["", *(f"perplexity x {multiple}" for multiple in MULTIPLES)])


def drawn(runs: Sequence[Sequence[Row]], kind: str) -> SkillRetention:
    """Return the mean over seeds of what is retained, to be drawn."""
    curves = [[row for row in rows if row["table"] == f"energies, {kind}"] for rows in runs]
    columns = {
        key: tuple(fmean(float(rows[place][key]) for rows in curves) for place in range(len(curves[0])))
        for key in curves[0][0]
        if key not in ("table", "row")
    }
    perplexity_multiples = columns.pop("perplexity, times")
    energies = tuple(float(row["row"]) for row in curves[0])
    return SkillRetention(energies, perplexity_multiples, columns, dict.fromkeys(columns, 0.0))


def main() -> None:
    """Run the benchmark, or make its tables and its picture."""
    args = seeds_parser(__doc__, ("mixture",)).parse_args()
    if args.data == "mixture":
        print(all_tables(run("tasks", args, results), {}))
        return
    runs, facts = read("tasks", "mixture")
    parts = [all_tables(runs, {})]
    for kind in POPULATIONS:
        parts += [f"**Order, {kind}**", "", intervals(runs, kind), ""]
    replace_section(DOCS / "analysis.md", "tasks", "\n" + "\n".join([*parts, facts]) + "\n")
    save(drawn(runs, "mixture").plot(), DOCS / "tasks.png")


if __name__ == "__main__":
    main()
