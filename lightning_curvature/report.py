"""What an edit did."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate


@dataclass(frozen=True)
class LayerEdit:
    """What an edit did to one layer.

    Args:
        energy: Asked share of the method's mass.
        energy_kept: Reached share.
        kept: Kept coefficients.
        total: All coefficients, ``d_out * d_in``.
        relative_change: ``||W' - W|| / ||W||`` (Frobenius).
        changed: Entries of the stored weight that are not what they were, after rounding to its dtype.
        tensor: Name of the weight.
        num_inputs: Positions behind the layer's factors.
        dropped: Share of the positions seen that did not count.
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


@dataclass(frozen=True)
class EditReport:
    """What an edit did; ``print(report)`` shows a table.

    Args:
        layers: By module name.
        method: Name of the editing method.
        provenance: Where the factors come from.
        skipped: Layers that were left as they are although they were meant, and why.
    """

    layers: Mapping[str, LayerEdit]
    method: str = "kfac"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)

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
        return "\n".join([title, table, *(f"Left as it is: {reason}" for reason in self.skipped.values())])
