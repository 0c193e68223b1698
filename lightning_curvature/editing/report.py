"""The report of an edit."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

from lightning_curvature._checks import listing


@dataclass(frozen=True)
class LayerEdit:
    """What an edit did to one layer.

    Args:
        energy: Share of the method's mass to keep, as it was asked for.
        energy_kept: Share that was kept.
        kept: Kept coefficients.
        total: All coefficients, ``d_out * d_in``.
        relative_change: ``||W' - W|| / ||W||`` (Frobenius).
        changed: Entries of the stored weight that are not what they were, after rounding to its dtype.
        tensor: Name of the weight.
        num_inputs: Positions behind the layer's factors.
        dropped: Share of the positions seen that did not count.
        num_gradients: Positions behind the factor of the outputs.
        needed: Positions that the factors should rest on, the larger side of the weight; 0 if no factor is read.
        also: Names of the tensors that are tied to the weight, and edited with it.
    """

    energy: float
    energy_kept: float
    kept: int
    total: int
    relative_change: float
    changed: int
    tensor: str
    num_inputs: int
    dropped: float
    num_gradients: int = 0
    needed: int = 0
    also: tuple[str, ...] = ()

    @property
    def positions(self) -> int:
        """Positions behind the factor that rests on fewer."""
        return min(self.num_inputs, self.num_gradients)


@dataclass(frozen=True)
class EditReport:
    """What an edit did; ``print(report)`` shows a table.

    Args:
        layers: By module name.
        method: Name of the editing method.
        provenance: Where the factors come from.
        skipped: Why a layer was not edited although it was asked for, by layer.
    """

    layers: Mapping[str, LayerEdit]
    method: str = "kfac"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

    def with_tied(self, names: Mapping[str, Iterable[str]]) -> "EditReport":
        """Return the report with the names of the tensors that are tied to each layer's weight.

        Args:
            names: All names of the tensor of each layer's weight; the weight's own name may be among them.
        """
        layers = {
            layer: dataclasses.replace(edit, also=tuple(name for name in names[layer] if name != edit.tensor))
            for layer, edit in self.layers.items()
        }
        return dataclasses.replace(self, layers=layers)

    def __str__(self) -> str:
        headers = [
            "layer",
            "energy",
            "reached",
            "kept",
            "of",
            "share",
            "changed",
            "||W'-W||/||W||",
            "positions",
            "not counted",
        ]
        rows = [
            [
                name,
                f"{edit.energy:.3g}",
                f"{edit.energy_kept:.4f}",
                edit.kept,
                edit.total,
                f"{edit.kept / edit.total:.1%}",
                f"{edit.changed / edit.total:.1%}",
                f"{edit.relative_change:.3f}",
                edit.num_inputs,
                f"{edit.dropped:.1%}",
            ]
            for name, edit in self.layers.items()
        ]
        source = ", ".join(f"{key}={value}" for key, value in self.provenance.items())
        title = f"Edited layers (method {self.method}; {source})" if source else f"Edited layers (method {self.method})"
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *("right",) * (len(headers) - 1)))
        return "\n".join([title, table, *self._remarks()])

    def _remarks(self) -> list[str]:
        """Return sentences on what the table does not show."""
        few = [
            f"{name!r} ({edit.positions} of {edit.needed})"
            for name, edit in self.layers.items()
            if edit.positions < edit.needed
        ]
        remarks = [f"Left as it is: {reason}" for reason in self.skipped.values()]
        if few:
            remarks.append(
                f"Factors that rest on fewer positions than the larger side of the weight: {', '.join(few)}. Their "
                "spectrum looks steeper than it is, and the edit removes more than it should: collect more positions."
            )
        for name, edit in self.layers.items():
            if edit.also and edit.changed:
                remarks.append(
                    f"The weight of layer {name!r} is that of {listing(edit.also)}, too, which is edited with it."
                )
        return remarks
