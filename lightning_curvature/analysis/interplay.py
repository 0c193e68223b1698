"""Whether layers can be judged one by one: what edits cost together, against the sum of what each costs alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_curvature.analysis.style import CLEAN, MEMORIZED, SHARP
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors


@dataclass(frozen=True)
class Interplay:
    """What edits of several groups of layers do to measures of a model, alone and together.

    Args:
        before: Measures of the unedited model.
        alone: Measures with one group edited, by group.
        together: Measures with all groups edited.
    """

    before: Mapping[str, float]
    alone: Mapping[str, Mapping[str, float]]
    together: Mapping[str, float]

    def excess(self, measure: str) -> float:
        """Return the change of all edits together minus the sum of the changes of each alone."""
        return self.together[measure] - self.before[measure] - sum(self._changes(measure).values())

    def plot(self, measure: str) -> Any:
        """Return a figure of one measure: each alone, their sum, and all together."""
        from matplotlib.figure import Figure

        changes = self._changes(measure)
        together = self.together[measure] - self.before[measure]
        names = [*changes, "sum of these", "together"]
        figure = Figure(figsize=(7.0, 0.9 + 0.34 * len(names)), layout="constrained")
        axes = figure.subplots()
        colors = [CLEAN] * len(changes) + [SHARP, MEMORIZED]
        axes.barh(names, [*changes.values(), sum(changes.values()), together], color=colors)
        axes.invert_yaxis()
        axes.set(xlabel=f"change of {measure}")
        return figure

    def _changes(self, measure: str) -> dict[str, float]:
        """Return what the edit of each group alone changes, by group."""
        return {group: measures[measure] - self.before[measure] for group, measures in self.alone.items()}


def interplay(
    module: nn.Module,
    factors: KroneckerFactors,
    editor: WeightEditor,
    groups: Mapping[str, Sequence[str]],
    measure: Callable[[], Mapping[str, float]],
) -> Interplay:
    """Edit groups of layers, one at a time and all together, and measure a model each time; edits are taken back.

    Args:
        module: The model.
        factors: Factors of all layers of the groups.
        editor: How to edit them.
        groups: Names of layers, by name of the group; no layer is in two of them.
        measure: Returns measures of the model as it is, such as losses (whose changes add up where layers do not
            interact).

    Raises:
        ValueError: If a group is empty, has a layer without factors, or has a layer of another group.
    """
    names = [name for group in groups.values() for name in group]
    missing = [name for name in names if name not in factors]
    if missing or len(set(names)) < len(names) or not all(groups.values()):
        raise ValueError(
            f"Each group needs layers of its own, with factors; without: {missing}, in all: {sorted(names)}."
        )

    def edited(layers: Sequence[str]) -> dict[str, float]:
        with editor.applied(module, KroneckerFactors({name: factors[name] for name in layers}, factors.provenance)):
            return dict(measure())

    return Interplay(dict(measure()), {name: edited(group) for name, group in groups.items()}, edited(names))
