"""What an edit does to recited text: evaluation, the energy curve, and the comparison with controls."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate
from torch import Tensor

from lightning_curvature.baselines.methods import METHODS
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.demos.unlearning import balanced_subnet
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.text.choosing import ENERGIES
from lightning_curvature.text.evaluation import Baseline, evaluate_sequences, perplexity, strict_rate
from lightning_curvature.text.matching import match_perplexity

PERPLEXITY_LIMIT = 1.08
"""Each method may raise the perplexity of clean tuning text to this multiple."""

COLUMNS = {
    "strict": "strict",
    "loose": "loose",
    "edit_distance": "edit distance",
    "unseen_strict": "unseen strict",
    "perplexity": "perplexity",
    "domain_perplexity": "domain perplexity",
    "ranking_overlap": "ranking overlap",
}
"""Metrics of the table, and the titles of their columns."""

Metrics = dict[str, float]


class Evaluation:
    """Measures models on the data that results are reported from.

    Args:
        model: The unedited model, in eval mode.
        data: Data of the demo.
    """

    def __init__(self, model: LitCausalLM, data: RecitedText) -> None:
        self.data = data
        self.validation = data.half("validation")
        self.baseline = Baseline(model.model, data.held_out["clean"]["report"])

    def __call__(self, model: LitCausalLM) -> Metrics:
        """Return the metrics of table 1 of arXiv:2510.24256 for a model, and those of unseen sequences."""
        metrics = evaluate_sequences(model.model, self.validation)
        unseen = evaluate_sequences(model.model, self.data.unseen)
        metrics |= {f"unseen_{name}": unseen[name] for name in ("strict", "loose", "edit_distance")}
        metrics["domain_perplexity"] = perplexity(model.model, self.data.held_out["domain"]["report"])
        return metrics | self.baseline.evaluate(model.model)

    def quick(self, model: LitCausalLM) -> Metrics:
        """Return what an energy curve needs."""
        return {
            "strict": strict_rate(model.model, self.validation),
            "unseen_strict": strict_rate(model.model, self.data.unseen),
            "perplexity": perplexity(model.model, self.data.held_out["clean"]["report"]),
            "domain_perplexity": perplexity(model.model, self.data.held_out["domain"]["report"]),
        }


def choose(model: LitCausalLM, factors: KroneckerFactors, method: str, windows: Tensor) -> WeightEditor:
    """Return the editor of a method at the energy that costs ``PERPLEXITY_LIMIT`` on some windows."""
    editor = METHODS[method]()
    return editor.at(match_perplexity(model.model, factors, editor, windows, PERPLEXITY_LIMIT, module=model).energy)


def compare_methods(
    model: LitCausalLM, factors: KroneckerFactors, data: RecitedText, evaluation: Evaluation, controls: bool
) -> dict[str, Metrics]:
    """Return what each method leaves at its energy, which is chosen on tuning text.

    Args:
        model: The unedited model.
        factors: Its factors.
        data: Data of the demo.
        evaluation: Measures on the data that results are reported from.
        controls: Measure all methods, or the curvature edit alone.

    Returns:
        By method, ``energy`` (where the method has one) and the metrics of :class:`Evaluation`.
    """
    results: dict[str, Metrics] = {}
    for method in METHODS if controls else ["kfac"]:
        editor = choose(model, factors, method, data.held_out["clean"]["tuning"])
        with editor.applied(model, factors):
            results[method] = {"energy": float(editor.energy), **evaluation(model)}  # type: ignore[arg-type]
    if controls:
        with balanced_subnet(model, data).applied(model, factors):
            results["bsn"] = evaluation(model)
    return results


def energy_curve(model: LitCausalLM, factors: KroneckerFactors, evaluation: Evaluation) -> dict[float, Metrics]:
    """Return what the curvature edit leaves at each of ``ENERGIES``."""
    curve = {}
    for energy in ENERGIES:
        with CurvatureEditor(energy).applied(model, factors):
            curve[energy] = evaluation.quick(model)
    return curve


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return rows of metrics as a table: rates in percent, perplexities as they are."""
    body = [
        [
            name,
            f"{row['energy']:.3f}" if "energy" in row else "",
            *(f"{row[m]:.1f}" if "perplexity" in m else f"{100 * row[m]:.1f}" for m in COLUMNS),
        ]
        for name, row in rows.items()
    ]
    alignment = ("left", *["right"] * (1 + len(COLUMNS)))
    return tabulate(body, ["", "energy", *COLUMNS.values()], disable_numparse=True, colalign=alignment)
