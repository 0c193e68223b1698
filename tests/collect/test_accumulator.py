"""Which process keeps the sums of a layer."""

from lightning_curvature.collect.sharded_accumulator import owners_of
from lightning_curvature.collect.sums import LayerKind
from lightning_curvature.distributed import Ranks


def test_layers_are_kept_together_unless_that_takes_more_of_a_process():
    kinds = {"gate": LayerKind(2, 8, False), "up": LayerKind(2, 8, False), "down": LayerKind(8, 2, False)}
    ranks = Ranks()
    ranks.size = 2
    assert owners_of(kinds, ranks) == {"gate": 0, "up": 0, "down": 1}
    ranks.size = 3
    assert sorted(owners_of(kinds, ranks).values()) == [0, 1, 2]
