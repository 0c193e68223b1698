"""Which examples use a direction most, and whether they are the memorized ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.analysis.inputs import check_activations
from lightning_curvature.analysis.style import MEMORIZED, SHARP
from lightning_curvature.factors.layer import LayerFactors


@dataclass(frozen=True)
class DirectionUse:
    """The examples that use some input directions of a layer most.

    Args:
        layer: Name of the layer.
        flat: Whether these are the flattest directions of the layer, or its sharpest.
        directions: Places in the eigenbasis of ``A``, sharpest first.
        top: For each direction, the examples that use it most, the strongest use first.
        precision: Share of memorized examples among them, for each direction.
        chance: Share of memorized examples among all of them.
    """

    layer: str
    flat: bool
    directions: tuple[int, ...]
    top: tuple[tuple[int, ...], ...]
    precision: tuple[float, ...]
    chance: float

    @property
    def mean_precision(self) -> float:
        """Mean of the precision over the directions."""
        return sum(self.precision) / len(self.precision)

    def plot(self) -> Any:
        """Return a figure of the precision of each direction beside chance."""
        return draw_precision([self])


def direction_use(
    layer: str,
    factors: LayerFactors,
    inputs: Tensor,
    memorized: Sequence[bool],
    flat: bool,
    count: int = 20,
    examples: int = 20,
) -> DirectionUse:
    """Find the examples that use the flattest, or the sharpest, input directions of a layer most.

    An example uses a direction ``v`` by the largest share ``(v . a)^2 / |a|^2`` over its positions.

    Args:
        layer: Name of the layer.
        factors: Its factors.
        inputs: Its inputs, ``[examples, positions, d_in]``.
        memorized: Whether each example is memorized.
        flat: Whether to look at the directions of lowest eigenvalue of ``A``, or of highest.
        count: Directions to look at, at most ``d_in``.
        examples: Examples to keep for each direction.

    Raises:
        ValueError: If a shape does not fit, or there are fewer examples than are asked for.
    """
    vectors = factors.basis.U_A
    rows = check_activations(inputs, len(vectors), "direction_use").to(vectors)
    if len(rows) != len(memorized) or len(rows) < examples:
        raise ValueError(f"{examples} of {len(rows)} examples were asked for, {len(memorized)} of them are labelled.")
    count = min(count, len(vectors))
    places = range(len(vectors) - count, len(vectors)) if flat else range(count)
    shares = torch.nn.functional.normalize(rows, dim=2) @ vectors[:, places.start : places.stop]
    top = shares.square().amax(1).topk(examples, dim=0).indices.T.cpu()
    labels = torch.tensor(list(memorized), dtype=torch.float64)
    return DirectionUse(
        layer,
        flat,
        tuple(places),
        tuple(tuple(row) for row in top.tolist()),
        tuple(labels[top].mean(1).tolist()),
        float(labels.mean()),
    )


def draw_precision(uses: Sequence[DirectionUse]) -> Any:
    """Draw which share of the examples that use each direction most is memorized.

    Args:
        uses: As :func:`direction_use` returns them, of sharp and of flat directions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for use in uses:
        color, label = (MEMORIZED, "flattest") if use.flat else (SHARP, "sharpest")
        axes.plot(
            range(1, len(use.precision) + 1),
            sorted(use.precision, reverse=True),
            "o-",
            color=color,
            markersize=4,
            label=f"{label} directions, mean {use.mean_precision:.2f}",
        )
    axes.axhline(uses[0].chance, color="black", linewidth=0.8, linestyle=":", label=f"chance {uses[0].chance:.2f}")
    axes.set(
        ylim=(-0.03, 1.03),
        xlabel="directions, by precision",
        ylabel=f"precision at {len(uses[0].top[0])}",
        title=f"Are the examples that use a direction most the memorized ones? {uses[0].layer}",
    )
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return figure
