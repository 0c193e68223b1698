"""The text demo: a small OLMo-2 recites what it read too often, and forgets it again."""

import dataclasses
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_curvature.baselines.methods import CONTROL_LABELS
from lightning_curvature.demos.files import versions, write_edited, write_json
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.recitation import PREFIX, SUFFIX, RecitedText
from lightning_curvature.demos.settings import TEXT, TextSettings
from lightning_curvature.demos.text_analyses import analyse_text
from lightning_curvature.demos.text_evaluation import (
    PERPLEXITY_LIMIT,
    Evaluation,
    compare_methods,
    energy_curve,
    table,
)
from lightning_curvature.demos.text_training import make_data, train_text
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.report import plots
from lightning_curvature.report.page import write_page
from lightning_curvature.storage.atomic import replacing_folder
from lightning_curvature.storage.jsonl import write_jsonl
from lightning_curvature.text.examples import Continued, continue_sections, write_side_by_side
from lightning_curvature.text.sequences import PromptedSequence, write_sequences

log = logging.getLogger(__name__)

NUM_EXAMPLES = 10
"""Sequences of each kind whose continuations are shown."""


def run_text(out: Path, seed: int = 0, compare: bool = False, settings: TextSettings = TEXT) -> dict[str, Any]:
    """Train, collect, edit and evaluate on English that every Python installation carries.

    Writes ``original.ckpt``, ``edited.ckpt``, ``factors.safetensors``, ``report.json``, ``analysis.json``,
    ``report.html``, ``continuations.md``, pictures, the Hugging Face folder ``model/``, and the data as files for the
    other commands: ``memorized.jsonl``, ``unseen.jsonl``, ``train.jsonl``, ``clean.jsonl``, ``domain.jsonl``,
    ``source.jsonl``.

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
    write_data(out, data, model)

    evaluation, prompts = Evaluation(model, data), example_prompts(data)
    before, said_before = evaluation(model), continue_sections(model.model, data.tokenizer, prompts)
    methods = compare_methods(model, factors, data, evaluation, compare)
    energy = methods["kfac"]["energy"]
    edit = write_edited(out / "original.ckpt", CurvatureEditor(energy), factors, out / "edited.ckpt")
    edited = LitCausalLM.load_from_checkpoint(out / "edited.ckpt", map_location="cpu", weights_only=True).eval()
    after, said_after = evaluation(edited), continue_sections(edited.model, data.tokenizer, prompts)
    curve = energy_curve(model, factors, evaluation)
    ended = time.perf_counter()

    write_side_by_side(out / "continuations.md", prompts, said_before, said_after, data.tokenizer)
    report = {
        "before": before,
        "after": after,
        "methods": methods,
        "curve": curve,
        "layers": {name: dataclasses.asdict(layer) for name, layer in edit.layers.items()},
        "continuations": continuation_records(prompts, said_before, said_after, data.tokenizer),
        "counts": count_data(data),
        "settings": {"seed": seed, "energy": energy, "perplexity_limit": PERPLEXITY_LIMIT, **vars(settings)},
        "seconds": {"data_train_collect": trained - started, "edit_and_evaluate": ended - trained},
        "versions": versions("transformers", "tokenizers"),
    }
    write_json(out / "report.json", report)
    draw_text(out, factors, report)
    analyse_text(model, factors, data).save(out)
    write_page(out)
    log.info("\n%s", edit)
    return report


def example_prompts(data: RecitedText) -> dict[str, list[PromptedSequence]]:
    """Return sequences to continue, by title: memorized ones, and clean text that was never trained on."""
    clean = data.held_out["clean"]["report"]
    windows = clean[:: max(len(clean) // NUM_EXAMPLES, 1)][:NUM_EXAMPLES].tolist()
    return {
        "Memorized": data.half("validation")[:NUM_EXAMPLES],
        "Ordinary": [PromptedSequence(tuple(w[:PREFIX]), tuple(w[PREFIX : PREFIX + SUFFIX])) for w in windows],
    }


def continuation_records(
    prompts: Mapping[str, list[PromptedSequence]], before: Continued, after: Continued, tokenizer: Any
) -> dict[str, list[dict[str, str]]]:
    """Return prompts, true suffixes, and continuations before and after the edit, by title, for ``report.json``."""
    return {
        title: [
            {
                "prompt": tokenizer.decode(sequence.prefix_ids),
                "true": tokenizer.decode(sequence.suffix_ids),
                "before": old,
                "after": new,
            }
            for sequence, old, new in zip(sequences, before[title], after[title], strict=True)
        ]
        for title, sequences in prompts.items()
    }


def count_data(data: RecitedText) -> dict[str, int]:
    """Return how many sequences (memorized, unseen) and tokens (clean, domain, train) the results rest on."""
    return {
        "memorized": len(data.half("validation")),
        "unseen": len(data.unseen),
        "clean": data.held_out["clean"]["report"].numel(),
        "domain": data.held_out["domain"]["report"].numel(),
        "train": sum(batch.numel() for batch in data.batches),
    }


def draw_text(out: Path, factors: KroneckerFactors, report: Mapping[str, Any]) -> None:
    """Draw the spectrum of the last layer and the energy curve."""
    name, energy = list(factors)[-1], report["settings"]["energy"]
    plots.save(plots.spectrum(factors[name], energy, name), out / "spectrum.png")
    plots.save(plots.recitation_curves(report["curve"], report["before"], energy), out / "energy.png")


def write_data(out: Path, data: RecitedText, model: LitCausalLM) -> None:
    """Write the data, and the model with its tokenizer, as files for the other commands."""
    with replacing_folder(out / "model") as folder:
        model.model.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
    write_sequences(out / "memorized.jsonl", data.memorized)
    write_sequences(out / "unseen.jsonl", data.unseen)
    documents = {
        "train": data.clean,
        "source": data.sources["domain"],
        **{kind: data.held_out_text[kind] for kind in ("clean", "domain")},
    }
    for name, texts in documents.items():
        write_jsonl(out / f"{name}.jsonl", ({"text": text} for text in texts))


def summary(report: Mapping[str, Any]) -> str:
    """Return what :func:`run_text` returned as a before/after table, with the controls that were measured."""
    methods = report["methods"]
    rows = {
        "before": report["before"],
        "after (edited.ckpt)": {"energy": report["settings"]["energy"], **report["after"]},
        **{label: methods[method] for method, label in CONTROL_LABELS.items() if method in methods},
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
