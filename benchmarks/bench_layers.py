"""Which layer to edit: does anything that needs no labels predict what the sweep finds?

Each layer is edited alone (K-FAC), as strongly as a limit allows: 1.02 times the perplexity of tuning text for each
MLP projection of the language model; 0.97 times the validation accuracy of the tuning part for each linear layer of the
ViT's blocks. *forgotten* is by how much the recited share falls: of the second, unseen set of sequences; of the noised
labels of the report part. What might predict it, layer by layer:

- *separation* (``lightning_curvature.analysis.rank_layers``): how well the share of activation energy in the flat half
  tells recited examples from others, as the distance of the area under the ROC curve from 0.5. Text: the tuning half of
  the memorized sequences, which the model recites, against never-memorized windows of the same domain; images: the CLS
  tokens of training images against those of validation images;
- *depth*: the number of the block;
- *relative change* of the weight under the default energy, from factors and weight alone;
- *curvature*: tr(A) tr(G), the total mass;
- *margins*: the share of the gradient of the recited examples' margins in the flat half of both sides (text only).

Spearman's rank correlation over the layers of one model; mean and sample standard deviation over seeds.

    python benchmarks/bench_layers.py python --models runs/models
    python benchmarks/bench_layers.py digits --models runs/models
    python benchmarks/bench_layers.py tables  # from results into docs/methods.md
"""

import argparse
import re
from collections.abc import Iterator
from typing import Any

import torch
from torchmetrics.functional import spearman_corrcoef

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis.layers import rank_layers
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.bulk import add_margins
from lightning_curvature.factors.basis import coefficients
from lightning_curvature.text.evaluation import strict_rate
from support.seeds import Row, run_or_write, seeds_parser
from support.subjects import WINDOWS, Images, Text, subject
from support.tables import Columns, mean, summary, table

PREDICTORS = ("separation", "depth", "relative change", "curvature", "margins")
COLUMNS: Columns = {
    "forgotten": ("forgotten", 100, 1),
    "separation": ("separation", 1, 3),
    "depth": ("depth", 1, 0),
    "relative change": ("relative change", 1, 2),
    "curvature": ("curvature", 1, 3),
    "margins": ("margins", 1, 3),
}


def text_predictors(model: Text, factors: KroneckerFactors) -> dict[str, dict[str, float]]:
    """Return *separation* and *margins* by layer of a language model."""
    recited = model.forget
    domain = model.data.held_out["domain"]["tuning"][:WINDOWS, : recited[0].ids.shape[1]]
    areas = rank_layers(
        model.model,
        factors,
        [batch.ids for batch in recited],
        domain.split(16),
        lambda ids: model.lm(input_ids=ids, use_cache=False),
    )
    flat_parts = {}
    for name, layer in add_margins(model.model, factors, recited, model.margins).items():
        C = coefficients(layer.margins, layer.basis)
        flat = C[C.shape[0] // 2 :, C.shape[1] // 2 :].square().sum() / C.square().sum()
        flat_parts[name] = float(flat)
    return {"separation": areas, "margins": flat_parts}


def image_predictors(model: Images, factors: KroneckerFactors) -> dict[str, dict[str, float]]:
    """Return *separation* by layer of a ViT."""
    train, val = model.data.train.tensors[0], model.data.val.tensors[0]
    return {"separation": rank_layers(model.model, factors, [train], [val], model.model, positions="first")}


def results(args: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Yield one row for each layer."""
    model = subject(args.data, seed, args)
    text = isinstance(model, Text)
    layers = "mlp" if text else ["*blocks.*"]
    factors = collect(model.model, model.rows, model.step, layers=layers, seed=seed)
    predicted = text_predictors(model, factors) if text else image_predictors(model, factors)
    predicted["separation"] = {name: abs(area - 0.5) for name, area in predicted["separation"].items()}
    predicted["depth"] = {name: float(re.search(r"\.(\d+)\.", name)[1]) for name in factors}
    predicted["curvature"] = {name: float(f.A.trace() * f.G.trace()) for name, f in factors.items()}
    report = CurvatureEditor().edited_weights(model.model, factors)[1]
    predicted["relative change"] = {name: edit.relative_change for name, edit in report.layers.items()}

    def recites() -> float:
        return strict_rate(model.lm, model.data.unseen) if text else model.measure()["memorized"]

    before = recites()
    for name in factors:
        editor = CurvatureEditor(layers=[name])
        energy = model.match(editor, factors, 1.02 if text else 0.97, {})
        with editor.at(energy).applied(model.model, factors):
            forgotten = before - recites()
        values = {key: float(by_layer[name]) for key, by_layer in predicted.items()}
        yield {"layer": name, "energy": energy, "forgotten": forgotten, **values}


def page(_data: str, runs: list[Any]) -> str:
    """Return the tables of one data set."""
    rows = []
    for key in PREDICTORS:
        correlations = []
        for run_ in runs:
            if key in run_[0]:
                pair = (torch.tensor([row[k] for row in run_], dtype=torch.float32) for k in (key, "forgotten"))
                correlations.append(float(spearman_corrcoef(*pair)))
        if correlations:
            rows.append([key, mean(correlations, len(runs), 2), *(f"{value:.2f}" for value in correlations)])
    ranks = table(rows, ["predictor", "rank correlation", *(f"seed {i}" for i in range(len(runs)))])
    layers = [{row["layer"]: row for row in run_} for run_ in runs]
    columns = {key: value for key, value in COLUMNS.items() if key in runs[0][0]}
    return f"{ranks}\n\n{summary(layers, columns)}"


def main() -> None:
    """Run the benchmark, or make its tables."""
    args = seeds_parser(__doc__, ("python", "wikitext", "digits")).parse_args()
    run_or_write("layers", args, results, page, "methods.md", ("python", "digits"))


if __name__ == "__main__":
    main()
