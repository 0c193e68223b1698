"""Whether the curvature basis orders directions as the loss does: predicted against measured curvature."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torchmetrics.functional.regression import spearman_corrcoef

from lightning_curvature.analysis.bands import BANDS
from lightning_curvature.analysis.curvature import Products, inner
from lightning_curvature.analysis.style import MEMORIZED, SHARP
from lightning_curvature.editing.scores import score_coefficients
from lightning_curvature.factors.layer import LayerFactors


@dataclass(frozen=True)
class CurvatureOrder:
    """Curvature of directions ``u_i v_j^T`` sampled over the whole spectrum of a layer.

    Args:
        layer: Name of the layer.
        place: Place of each direction in the order by ``lam_i mu_j``, from 0, the sharpest, to 1.
        ggn: ``v^T GGN v`` of the mean loss over the data.
        hessian: ``v^T H v``.
        predicted: What each score predicts.
    """

    layer: str
    place: tuple[float, ...]
    ggn: tuple[float, ...]
    hessian: tuple[float, ...]
    predicted: Mapping[str, tuple[float, ...]]

    def correlation(self, score: str, measured: str = "ggn", start: float = 0.0, end: float = 1.0) -> float:
        """Return Spearman's rank correlation of predicted and measured curvature, in a part of the spectrum.

        Args:
            score: One of ``predicted``.
            measured: ``"ggn"`` or ``"hessian"``.
            start: Where the part starts, as ``place``.
            end: Where it ends.
        """
        chosen = [index for index, place in enumerate(self.place) if start <= place <= end]
        columns = self.predicted[score], getattr(self, measured)
        return float(spearman_corrcoef(*(torch.tensor(values, dtype=torch.float64)[chosen] for values in columns)))

    def by_band(self, score: str, measured: str = "ggn") -> dict[str, float]:
        """Return the correlation over the whole spectrum and in each band, the sharpest first."""
        bands = pairwise((0.0, *BANDS))
        return {"all": self.correlation(score, measured)} | {
            f"{start:.0%} to {end:.0%}": self.correlation(score, measured, start, end) for start, end in bands
        }

    def plot(self) -> Any:
        """Return a figure of measured against predicted curvature."""
        import numpy as np
        from matplotlib.figure import Figure

        scores = list(self.predicted)
        figure = Figure(figsize=(1.0 + 4.2 * len(scores), 4.2), layout="constrained")
        panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
        for axes, score in zip(panels, scores, strict=True):
            for name, color in (("ggn", SHARP), ("hessian", MEMORIZED)):
                measured = np.abs(getattr(self, name))
                label = f"|{name}|, rank correlation {self.correlation(score, name):.2f}"
                axes.plot(self.predicted[score], measured, ".", color=color, alpha=0.6, label=label)
            axes.set(xscale="log", yscale="log", xlabel=f"predicted: {score}")
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=8)
        panels[0].set_ylabel("measured curvature")
        figure.suptitle(f"Curvature of directions of {self.layer}", fontsize=10)
        return figure


def curvature_order(
    products: Products,
    layer: str,
    factors: LayerFactors,
    scores: Sequence[str] = ("kfac",),
    count: int = 200,
    seed: int = 0,
) -> CurvatureOrder:
    """Measure the curvature of directions over the whole spectrum of a layer, beside what is predicted.

    Args:
        products: Products of the loss over some data, with targets; the layer must be among theirs.
        layer: Name of the layer.
        factors: Its factors; the weight must be stored as ``[d_out, d_in]``.
        scores: Scores to compare, see :mod:`~lightning_curvature.editing.scores`.
        count: Directions, as many in each part of the order by ``lam_i mu_j``.
        seed: Seed of the sample.

    Raises:
        ValueError: If the factors do not fit the layer, or lack what a score needs.
    """
    weight = products.weights[layer]
    if factors.transposed:
        raise ValueError(f"Layer {layer!r} stores its weight as [d_in, d_out] (Conv1D), which is not supported here.")
    if tuple(weight.shape) != factors.shape:
        raise ValueError(f"Layer {layer!r}: factors for {list(factors.shape)}, the weight is {list(weight.shape)}.")
    basis = factors.basis
    tables = {
        score: score_coefficients(score, torch.ones(factors.shape, dtype=torch.float64, device="cpu"), factors)
        for score in ("kfac", *scores)
    }
    pairs = tables["kfac"].flatten().argsort(descending=True)
    generator = torch.Generator().manual_seed(seed)
    places = (
        (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float32, device="cpu"))
        / count
        * len(pairs)
    ).long()
    sampled = pairs[places]
    zeros = {name: torch.zeros_like(tensor) for name, tensor in products.weights.items() if name != layer}
    ggn, hessian = [], []
    for pair in sampled.tolist():
        i, j = divmod(pair, factors.shape[1])
        direction = zeros | {layer: torch.outer(basis.U_G[:, i], basis.U_A[:, j]).to(weight)}
        ggn.append(float(products.quadratics(direction).mean()))
        hessian.append(inner(direction, products.hessian(direction)))
    predicted = {score: tuple(tables[score].flatten()[sampled].tolist()) for score in scores}
    return CurvatureOrder(layer, tuple((places / len(pairs)).tolist()), tuple(ggn), tuple(hessian), predicted)
