"""What edits of growing strength leave of the skills of a model, and what goes with the loss of them.

Source: arXiv:2510.24256, section 6: facts and arithmetic lie close to memorized text, logic and open-book reading far
from it.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_curvature._checks import did_you_mean
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.sweep import sweep

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class SkillRetention:
    """Skills of a model under edits of growing strength.

    Args:
        energies: Energy of each edit, falling; the first is 1, the unedited model.
        perplexity: Perplexity of ordinary text under each edit, in multiples of that of the unedited model.
        accuracy: By skill, the accuracy under each edit.
        chance: By skill, the accuracy of a guess.
    """

    energies: tuple[float, ...]
    perplexity: tuple[float, ...]
    accuracy: Mapping[str, tuple[float, ...]]
    chance: Mapping[str, float]

    def retained(self, skill: str) -> tuple[float, ...]:
        """Return the share of a skill that each edit leaves: 1 as before, 0 at chance, negative below chance."""
        before, chance = self.accuracy[skill][0], self.chance[skill]
        return tuple((accuracy - chance) / (before - chance) for accuracy in self.accuracy[skill])

    def at_perplexity(self, multiple: float) -> dict[str, float]:
        """Return the retained share of each skill where edits first cost a given perplexity.

        The value is interpolated between the two edits around that perplexity, linearly in its logarithm.

        Args:
            multiple: Perplexity, in multiples of that of the unedited model; more than 1.

        Raises:
            ValueError: If no edit costs as much.
        """
        costs = np.log(np.maximum.accumulate(self.perplexity))
        if not 0 < np.log(multiple) <= costs[-1]:
            raise ValueError(
                f"The edits cost perplexity x 1 to x {np.exp(costs[-1]):.3f}, not x {multiple}. Measure lower energies."
            )
        upper = int(np.searchsorted(costs, np.log(multiple)))
        fraction = (np.log(multiple) - costs[upper - 1]) / (costs[upper] - costs[upper - 1])
        retained = {skill: self.retained(skill) for skill in self.accuracy}
        return {skill: float(v[upper - 1] + fraction * (v[upper] - v[upper - 1])) for skill, v in retained.items()}

    def plot(self) -> Any:
        """Return a figure of the retained share of each skill, against energy and against perplexity."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11.0, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for skill, marker in zip(self.accuracy, itertools.cycle("os^vD<>p"), strict=False):
            for axes, places in ((left, self.energies), (right, self.perplexity)):
                axes.plot(places, self.retained(skill), f"{marker}-", markersize=4, label=skill)
        left.set(xlabel="energy", ylabel="retained share (0: chance)")
        left.invert_xaxis()
        right.set(xlabel="perplexity of ordinary text, times that before", xscale="log")
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter("{x:g}")
        for axes in (left, right):
            axes.axhline(0.0, color="black", linewidth=0.8)
            axes.grid(alpha=0.25)
        right.legend(frameon=False)
        figure.suptitle("What edits leave of each skill")
        return figure


def skill_retention(
    module: nn.Module,
    factors: KroneckerFactors,
    editor: WeightEditor,
    energies: Iterable[float],
    measure: Callable[[], Mapping[str, float]],
    chance: Mapping[str, float],
) -> SkillRetention:
    """Measure the skills of a model under edits of growing strength; edits are taken back.

    Args:
        module: The model.
        factors: Factors of the layers to edit.
        editor: How to edit them; ``energies`` take the place of its energy.
        energies: Shares to keep, in (0, 1].
        measure: Returns the accuracy in each skill and the ``"perplexity"`` of the model as it is.
        chance: Accuracy of a guess, by skill.

    Raises:
        ValueError: If ``measure`` and ``chance`` do not name the same skills, or the unedited model is no better than
            a guess in a skill, so that there is nothing to retain.
    """

    def checked() -> Mapping[str, float]:
        measures = measure()
        if {*measures} != {*chance, PERPLEXITY}:
            odd = sorted({*measures} ^ {*chance, PERPLEXITY})
            hint = "".join(did_you_mean(name, {*measures, *chance, PERPLEXITY} - {name}) for name in odd[:1])
            raise ValueError(f"`measure` must return {PERPLEXITY!r} and each skill of `chance`; odd: {odd}.{hint}")
        return measures

    falling = sorted({float(energy) for energy in energies} - {1.0}, reverse=True)
    rows = sweep(module, factors, checked, {"edit": editor}, falling)
    for skill, guess in chance.items():
        if rows[0][skill] <= guess:
            raise ValueError(
                f"The unedited model has {rows[0][skill]:.3f} in {skill!r}, where a guess has {guess:.3f}: it never "
                "learned it. Train it until it has, or leave this skill out."
            )
    return SkillRetention(
        tuple(row["energy"] for row in rows),
        tuple(row[PERPLEXITY] / rows[0][PERPLEXITY] for row in rows),
        {skill: tuple(row[skill] for row in rows) for skill in chance},
        dict(chance),
    )


def rank_correlation(x: Sequence[float], y: Sequence[float], controls: Sequence[Sequence[float]] = ()) -> float:
    """Return Spearman's rank correlation of two quantities, without what controls explain of both.

    This is the partial correlation of ranks: the ranks of ``x`` and ``y`` are regressed on the ranks of the controls,
    and the residuals are correlated.

    Args:
        x: The first quantity, a value of each example.
        y: The second quantity, likewise.
        controls: More values of each example, one sequence for each control.

    Raises:
        ValueError: If the sequences differ in length, or there are too few examples for as many controls.

    Example:
        >>> x, y, size = [2, 1, 4, 3, 6, 5], [1, 3, 2, 5, 4, 6], [1, 2, 3, 4, 5, 6]
        >>> round(rank_correlation(x, y), 3), round(rank_correlation(x, y, [size]), 3)
        (0.486, -0.955)
    """
    values = [np.asarray(v, dtype=np.float64) for v in (x, y, *controls)]
    if len({len(v) for v in values}) > 1 or len(values[0]) < len(values) + 1:
        raise ValueError(
            f"A rank correlation with {len(controls)} controls needs more than {len(controls) + 2} examples, with a "
            f"value of each quantity; found {[len(v) for v in values]}."
        )
    ranks = np.stack([_ranks(v) for v in values], 1)
    known = np.column_stack([np.ones(len(ranks)), ranks[:, 2:]])
    left = ranks[:, :2] - known @ np.linalg.lstsq(known, ranks[:, :2], rcond=None)[0]
    return float(np.corrcoef(left, rowvar=False)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (counts.cumsum() - (counts - 1) / 2)[inverse]
    return ranks
