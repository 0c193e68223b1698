"""The text demo: a small OLMo-2 recites what it read too often, and forgets it again."""

import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger
from tabulate import tabulate
from torch import Tensor

from lightning_curvature.baselines.methods import CONTROL_LABELS, METHODS
from lightning_curvature.demos.files import versions, write_edited, write_json
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.python_text import read_texts
from lightning_curvature.demos.recitation import PREFIX, SUFFIX, RecitedText
from lightning_curvature.demos.settings import TEXT, TextSettings
from lightning_curvature.demos.text_analyses import analyse_text
from lightning_curvature.demos.unlearning import balanced_subnet
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.report import plots
from lightning_curvature.report.page import write_page
from lightning_curvature.storage.atomic import replacing, replacing_folder
from lightning_curvature.storage.jsonl import write_jsonl
from lightning_curvature.text.choosing import ENERGIES
from lightning_curvature.text.evaluation import Baseline, evaluate_sequences, perplexity, strict_rate
from lightning_curvature.text.examples import continue_texts, side_by_side
from lightning_curvature.text.matching import match_perplexity
from lightning_curvature.text.sequences import PromptedSequence, write_sequences
from lightning_curvature.trainer.callback import KFACEditCallback

log = logging.getLogger(__name__)

PERPLEXITY_LIMIT = 1.08
"""Each method may raise the perplexity of clean tuning text to this multiple."""
METRICS = ("strict", "loose", "edit_distance", "unseen_strict", "perplexity", "domain_perplexity", "ranking_overlap")

Metrics = dict[str, float]


class Evaluation:
    """Measures models on the report part of the data.

    Args:
        model: The unedited model, in eval mode.
        data: The demo's data.
    """

    def __init__(self, model: LitCausalLM, data: RecitedText) -> None:
        self.data = data
        self.validation = data.half("validation")
        self.baseline = Baseline(model.model, data.held_out["clean"]["report"])

    def __call__(self, model: LitCausalLM) -> Metrics:
        """Return the paper's Table 1 for a model, and a little more."""
        results = evaluate_sequences(model.model, self.validation)
        unseen = evaluate_sequences(model.model, self.data.unseen)
        results |= {f"unseen_{name}": unseen[name] for name in ("strict", "loose", "edit_distance")}
        results["domain_perplexity"] = perplexity(model.model, self.data.held_out["domain"]["report"])
        return results | self.baseline.evaluate(model.model)

    def quick(self, model: LitCausalLM) -> Metrics:
        """Return what an energy curve needs."""
        return {
            "strict": strict_rate(model.model, self.validation),
            "unseen_strict": strict_rate(model.model, self.data.unseen),
            "perplexity": perplexity(model.model, self.data.held_out["clean"]["report"]),
            "domain_perplexity": perplexity(model.model, self.data.held_out["domain"]["report"]),
        }


def train_text(
    out: Path, seed: int, settings: TextSettings, data: RecitedText
) -> tuple[LitCausalLM, KFACEditCallback, pl.Trainer]:
    """Train the demo's model; the validation at the end collects the factors, on clean text of the training set."""
    pl.seed_everything(seed, verbose=False)
    model = LitCausalLM(
        settings.vocab_size,
        settings.hidden,
        4 * settings.hidden,
        settings.layers,
        decay=0.5 * (len(data.batches) - settings.steps) / len(data.batches),  # the second half of the repetitions
    )
    callback = KFACEditCallback(layers="mlp", loop="validation", seed=seed)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed",
        callbacks=[callback],
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        log_every_n_steps=20,
        logger=CSVLogger(out, name="", version="logs"),
        enable_checkpointing=False,  # saved by hand, under the demo's own names
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # the data are in memory
        trainer.fit(model, data)
    model.eval()
    return model, callback, trainer


def make_data(seed: int, settings: TextSettings) -> RecitedText:
    """Return the demo's data: docstrings are clean text, the language reference is the domain, comments the third."""
    texts = read_texts()
    return RecitedText(
        texts["docstrings"],
        texts["reference"],
        texts["comments"],
        num_sequences=settings.sequences,
        steps=settings.steps,
        exposures=settings.exposures,
        collected=settings.collected,
        vocab_size=settings.vocab_size,
        seed=seed,
    )


def choose(model: LitCausalLM, factors: KroneckerFactors, method: str, windows: Tensor) -> WeightEditor:
    """Return the editor of a method at the energy that costs ``PERPLEXITY_LIMIT`` on some windows."""
    editor = METHODS[method]()
    return editor.at(match_perplexity(model.model, factors, editor, windows, PERPLEXITY_LIMIT, owner=model).energy)


def run_text(out: Path, seed: int = 0, compare: bool = False, settings: TextSettings = TEXT) -> dict[str, Any]:
    """Train, collect, edit and evaluate on English that every Python installation carries.

    Writes ``original.ckpt``, ``edited.ckpt``, ``factors.safetensors``, ``report.json``, ``analysis.json``,
    ``report.html``, ``continuations.md``, pictures,
    the Hugging Face folder ``model/``, and the data as files for the other commands: ``memorized.jsonl``,
    ``unseen.jsonl``, ``train.jsonl``, ``clean.jsonl``, ``domain.jsonl``, ``source.jsonl``.

    Args:
        out: Folder to write to.
        seed: Seed of the data and the training.
        compare: Also measure the controls, at the same perplexity.
        settings: Sizes.

    Returns:
        What ``report.json`` holds.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    data = make_data(seed, settings)
    model, callback, trainer = train_text(out, seed, settings, data)
    trained = time.perf_counter()
    factors = callback.factors
    trainer.save_checkpoint(out / "original.ckpt", weights_only=False)
    factors.save(out / "factors.safetensors")
    with replacing_folder(out / "model") as folder:
        model.model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
    write_data(out, data)

    evaluation = Evaluation(model, data)
    before = evaluation(model)
    prompts = {
        "Memorized": data.half("validation")[:10],
        "Ordinary": ordinary_prompts(data, 10),
    }
    said = {title: continue_texts(model.model, data.tokenizer, sequences) for title, sequences in prompts.items()}
    methods: dict[str, Metrics] = {}
    for method in METHODS if compare else ["kfac"]:
        editor = choose(model, factors, method, data.held_out["clean"]["tuning"])
        with editor.applied(model, factors):
            methods[method] = {"energy": float(editor.energy), **evaluation(model)}  # type: ignore[arg-type]
    if compare:
        with balanced_subnet(model, data).applied(model, factors):
            methods["bsn"] = evaluation(model)
    energy = methods["kfac"]["energy"]
    edit = write_edited(out / "original.ckpt", CurvatureEditor(energy), factors, out / "edited.ckpt")
    edited = LitCausalLM.load_from_checkpoint(out / "edited.ckpt", map_location="cpu", weights_only=True).eval()
    after = evaluation(edited)
    curve = {}
    for point in ENERGIES:
        with CurvatureEditor(point).applied(model, factors):
            curve[point] = evaluation.quick(model)
    ended = time.perf_counter()

    says = {title: continue_texts(edited.model, data.tokenizer, sequences) for title, sequences in prompts.items()}
    page = side_by_side(
        {title: (sequences, said[title], says[title]) for title, sequences in prompts.items()}, data.tokenizer
    )
    with replacing(out / "continuations.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    name = list(factors)[-1]
    plots.save(plots.spectrum(factors[name], energy, name), out / "spectrum.png")
    plots.save(plots.recitation_curves(curve, before, energy), out / "energy.png")
    report = {
        "before": before,
        "after": after,
        "methods": methods,
        "curve": curve,
        "layers": {name: dataclasses.asdict(layer) for name, layer in edit.layers.items()},
        "continuations": {
            title: [
                {
                    "prompt": data.tokenizer.decode(s.prefix_ids),
                    "true": data.tokenizer.decode(s.suffix_ids),
                    "before": old,
                    "after": new,
                }
                for s, old, new in zip(sequences, said[title], says[title], strict=True)
            ]
            for title, sequences in prompts.items()
        },
        "counts": {
            "memorized": len(evaluation.validation),
            "unseen": len(data.unseen),
            "clean": data.held_out["clean"]["report"].numel(),
            "domain": data.held_out["domain"]["report"].numel(),
            "train": sum(batch.numel() for batch in data.batches),
        },
        "settings": {
            "seed": seed,
            "energy": energy,
            "perplexity_limit": PERPLEXITY_LIMIT,
            **dataclasses.asdict(settings),
        },
        "seconds": {"data_train_collect": trained - started, "edit_and_evaluate": ended - trained},
        "versions": versions("transformers", "tokenizers"),
    }
    write_json(out / "report.json", report)
    analyse_text(model, factors, data).save(out)
    write_page(out)
    log.info("\n%s", edit)
    return report


def ordinary_prompts(data: RecitedText, count: int) -> list[PromptedSequence]:
    """Return prefixes and suffixes of clean text that was never trained on."""
    windows = data.held_out["clean"]["report"][:: max(len(data.held_out["clean"]["report"]) // count, 1)]
    return [PromptedSequence(tuple(w[:PREFIX]), tuple(w[PREFIX : PREFIX + SUFFIX])) for w in windows[:count].tolist()]


def write_data(out: Path, data: RecitedText) -> None:
    """Write the data as files for the other commands."""
    write_sequences(out / "memorized.jsonl", data.memorized)
    write_sequences(out / "unseen.jsonl", data.unseen)
    documents = {
        "train": data.clean,
        "source": data.sources["domain"],
        **{kind: data.held_out_text[kind] for kind in ("clean", "domain")},
    }
    for name, texts in documents.items():
        write_jsonl(out / f"{name}.jsonl", ({"text": text} for text in texts))


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return rows of metrics as a table: rates in percent, perplexities as they are."""
    body = [
        [
            name,
            f"{row['energy']:.3f}" if "energy" in row else "",
            *(f"{row[m]:.1f}" if "perplexity" in m else f"{100 * row[m]:.1f}" for m in METRICS),
        ]
        for name, row in rows.items()
    ]
    headers = [
        "",
        "energy",
        "strict",
        "loose",
        "edit distance",
        "unseen strict",
        "perplexity",
        "domain perplexity",
        "ranking overlap",
    ]
    return tabulate(body, headers, disable_numparse=True, colalign=("left", *("right",) * 8))


def summary(report: Mapping[str, Any]) -> str:
    """Return what :func:`run_text` returned as a before/after table, with the controls that were measured."""
    rows = {
        "before": report["before"],
        "after (edited.ckpt)": {"energy": report["settings"]["energy"], **report["after"]},
        **{label: report["methods"][method] for method, label in CONTROL_LABELS.items() if method in report["methods"]},
    }
    counts, before, after = report["counts"], report["before"], report["after"]
    ratios = {m: after[m] / before[m] for m in ("perplexity", "domain_perplexity")}
    limit = report["settings"]["perplexity_limit"] - 1
    return "\n".join(
        [
            table(rows),
            "",
            f"Perplexity x {ratios['perplexity']:.3f} on clean text, x {ratios['domain_perplexity']:.3f} on the "
            "memorized domain; rates in %.",
            f"Strict, loose, edit distance: validation half of the memorized sequences ({counts['memorized']}).",
            f"Unseen: {counts['unseen']} sequences of another kind of text, on which no energy was chosen.",
            f"Perplexity and ranking overlap: {counts['clean']} tokens of held-out clean text; domain: "
            f"{counts['domain']} tokens.",
            "Energies were chosen on other clean text: the strongest edit that costs at most "
            f"{limit:.0%} perplexity there.",
        ]
    )
