"""The tables of docs/support.md: what every cell must be. Tests run each cell, and compare.

``python -m tests.support.matrix`` prints the tables.
"""

from tabulate import tabulate

from tests.support import cells

FISHER = ("sketched", "sampled", "exact", "empirical")
LOOPS = ("fit", "validate")
ONE, DDP2, DDP3, FSDP2, TENSOR, BOTH = cells.STRATEGIES
SHOWN = (ONE, DDP2, FSDP2, TENSOR)
"""Strategies with which every option is tried."""

_REENTRANT = "refused: The model uses reentrant activation checkpointing: layers 'net.1', 'net.3' run without a graph"
_DOUBLE = "refused: The `ModelParallelStrategy` does not support `Fabric(..., precision='64-true')`"
_CLIP = "refused: aten._foreach_norm.Scalar got mixed torch.Tensor and DTensor"

KINDS: dict[tuple[str, str, str], str] = {}
"""Cells of the first table that are not a plain yes, by strategy, loop and kind."""

OPTIONS: dict[tuple[str, str], str] = {
    **{("activation checkpointing, reentrant", strategy): _REENTRANT for strategy in SHOWN},
    **{('`precision="64-true"`', strategy): _DOUBLE for strategy in (FSDP2, TENSOR)},
    ("`gradient_clip_val`", TENSOR): _CLIP,
}
"""Cells of the second table that are not a plain yes, by option and strategy."""


def tables():
    """Return both tables as Markdown."""
    kinds = [
        [strategy, *(KINDS.get((strategy, loop, fisher), "yes") for loop in LOOPS for fisher in FISHER)]
        for strategy in cells.STRATEGIES
    ]
    heads = ["strategy", *(f"{loop}, {fisher}" for loop in LOOPS for fisher in FISHER)]
    options = [[name, *(OPTIONS.get((name, strategy), "yes") for strategy in SHOWN)] for name in cells.OPTIONS]
    return "\n\n".join(
        tabulate(rows, head, tablefmt="github") for rows, head in ((kinds, heads), (options, ["option", *SHOWN]))
    )


if __name__ == "__main__":
    print(tables())  # noqa: T201
