r"""Telling memorized examples from others without labels, from one forward pass.

Memorized examples use directions that few others use. The score of an example is therefore the share of its activation
energy in the flat half of the eigenbasis of ``A``, the second moment of a layer's inputs over a population. With
:math:`v_j` the eigenvectors of ``A`` and :math:`a_t` the inputs at the positions of the example it is
:math:`\sum_t \sum_{j \, flat} (v_j^\top a_t)^2 / \sum_t \lVert a_t \rVert^2`.

Source of the idea: github.com/smarter/memorization_kfac, notes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_curvature.analysis.inputs import check_activations
from lightning_curvature.analysis.style import KINDS, SHARP
from lightning_curvature.baselines.random_basis import random_orthogonal
from lightning_curvature.factors.decomposition import decompose
from lightning_curvature.factors.layer import LayerFactors

FLAT = 0.5
"""Share of the eigenvectors of ``A`` that counts as flat, those of lowest eigenvalue."""


@dataclass(frozen=True)
class Detection:
    """How well scores tell memorized examples from others.

    Args:
        auroc: By name of a score, the area under the ROC curve; 0.5 is chance.
        memorized: By name of a score, the scores of memorized examples.
        other: The same scores of other examples.
    """

    auroc: Mapping[str, float]
    memorized: Mapping[str, tuple[float, ...]]
    other: Mapping[str, tuple[float, ...]]

    def plot(self) -> Any:
        """Return a figure of the areas, and of the scores that separate best."""
        import numpy as np
        from matplotlib.figure import Figure

        names = sorted(self.auroc, key=lambda name: self.auroc[name])
        figure = Figure(figsize=(11.0, 0.9 + max(0.28 * len(names), 2.4)), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        left.barh(names, [self.auroc[name] for name in names], color=SHARP)
        for place, name in enumerate(names):
            left.text(self.auroc[name], place, f" {self.auroc[name]:.3f}", va="center", fontsize=8)
        left.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
        left.set(xlim=(0, 1.12), xlabel="AUROC (dotted: chance)")
        left.tick_params(labelsize=8)
        best = names[-1]
        scores = self.memorized[best], self.other[best]
        edges = np.histogram_bin_edges(np.concatenate(scores), 25)
        for values, color, label in zip(scores, KINDS, ("memorized", "other"), strict=True):
            right.hist(values, edges, color=color, alpha=0.6, label=label)
        right.set(xlabel=best, ylabel="examples")
        right.legend(frameon=False)
        figure.suptitle("Telling memorized examples from others without labels")
        return figure


def flat_shares(A: Tensor | LayerFactors, inputs: Tensor, flat: float = FLAT) -> Tensor:
    """Return the share of each example's activation energy in the flat part of the eigenbasis of A.

    Args:
        A: Second moment of the layer's inputs, ``[d_in, d_in]``, or the layer's factors.
        inputs: Its inputs, ``[examples, positions, d_in]``.
        flat: Share of the eigenvectors that counts as flat.

    Returns:
        Shares in [0, 1], higher where an example looks more memorized, float64 ``[examples]``, on the device of
        ``inputs``; 0 for an example of zeros alone.

    Raises:
        ValueError: If a shape does not fit, ``flat`` leaves no direction on one of the sides, or A is zero or not
            finite.
    """
    vectors = A.basis.U_A if isinstance(A, LayerFactors) else decompose(A, "Factor A")[0]
    return _energy_shares(vectors, inputs, flat)


def random_shares(inputs: Tensor, flat: float = FLAT, seed: int = 0) -> Tensor:
    """Return what :func:`flat_shares` returns, for random orthonormal directions: a control.

    Args:
        inputs: Inputs of a layer, ``[examples, positions, d_in]``.
        flat: Share of the directions that counts as flat.
        seed: Seed of the directions.
    """
    return _energy_shares(random_orthogonal(inputs.shape[2], torch.Generator().manual_seed(seed)), inputs, flat)


def _energy_shares(vectors: Tensor, inputs: Tensor, flat: float) -> Tensor:
    rows = check_activations(inputs, len(vectors), "flat_shares")
    count = round(flat * len(vectors))
    if not 0 < count < len(vectors):
        raise ValueError(f"flat={flat} takes {count} of {len(vectors)} directions; use a share between 0 and 1.")
    energy = (rows @ vectors[:, -count:].to(rows)).square().sum((1, 2))
    shares: Tensor = energy / rows.square().sum((1, 2)).clamp(min=torch.finfo(rows.dtype).tiny)
    return shares


def activation_norms(inputs: Tensor) -> Tensor:
    """Return the mean norm of each example's activations ``[examples, positions, d_in]``, a control."""
    norms: Tensor = inputs.double().norm(dim=2).mean(1)
    return norms


def layer_scores(factors: Mapping[str, LayerFactors], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the flat share of each example in each layer, beside a random basis and the activation norm.

    Args:
        factors: Factors by layer.
        inputs: Inputs of these layers, ``[examples, positions, d_in]``.

    Returns:
        ``"flat share, LAYER"``, ``"random basis, LAYER"`` and ``"activation norm, LAYER"``, each ``[examples]``.
    """
    scores = {f"flat share, {name}": flat_shares(factors[name], rows) for name, rows in inputs.items()}
    scores |= {f"random basis, {name}": random_shares(rows) for name, rows in inputs.items()}
    return scores | {f"activation norm, {name}": activation_norms(rows) for name, rows in inputs.items()}


def auroc(memorized: Tensor, others: Tensor) -> float:
    """Return the probability that a memorized example has a higher score than another, ties counted by half.

    >>> auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    scores = torch.cat([memorized, others]).double()
    target = torch.cat([torch.ones(len(memorized)), torch.zeros(len(others))]).long()
    # torchmetrics would squeeze scores outside [0, 1] through a sigmoid, which ties large ones: ranks keep the order.
    ranks = torch.unique(scores, return_inverse=True)[1].double()
    return float(binary_auroc(ranks / max(float(ranks.max()), 1.0), target))


def detect(memorized: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Detection:
    """Compare scores: for each, how well it tells memorized examples from others.

    Args:
        memorized: By name of a score, the scores of memorized examples, ``[n]``, higher where they look memorized.
        others: The same scores of other examples, ``[m]``.

    Raises:
        ValueError: If the two have different scores.
    """
    if list(memorized) != list(others):
        raise ValueError(f"The same scores are needed for both, found {list(memorized)} and {list(others)}.")
    return Detection(
        {name: auroc(memorized[name], others[name]) for name in memorized},
        *({name: tuple(scores.tolist()) for name, scores in kind.items()} for kind in (memorized, others)),
    )
