"""Every strategy, every kind of Fisher, every option: the factors of one process, or a refusal by name."""

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from tests.support import cells, matrix, processes
from tests.support.matrix import DDP2, FISHER, LOOPS, ONE, SHOWN, TENSOR


@functools.cache
def cells_of(strategy, what):
    """Run all cells of a strategy in its processes, once."""
    with tempfile.TemporaryDirectory() as folder:
        first, *others = processes.run(cells.STRATEGIES[strategy][0], getattr(cells, what), strategy, folder)
    for part in others:  # each process ends with the same factors, read from the same file, and the same edit
        assert {key: value if isinstance(value, str) else edits(value) for key, value in part.items()} == {
            key: value if isinstance(value, str) else edits(value) for key, value in first.items()
        }
    return first


def edits(cell):
    return {layer: values[2:] for layer, values in cell.items()}


def same(factors, expected, rtol):
    """Tell whether the factors of two cells agree: each within a share of its norm, and all counts."""

    def near(a, b):
        return (a.double() - b.double()).norm() <= rtol * b.double().norm()

    return factors.keys() == expected.keys() and all(
        near(factors[k][0], expected[k][0])
        and near(factors[k][1], expected[k][1])
        and factors[k][2:4] == expected[k][2:4]
        and abs(factors[k][4] - expected[k][4]) <= 10 * rtol
        for k in factors
    )


@pytest.mark.parametrize("fisher", FISHER)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("strategy", cells.STRATEGIES)
def test_every_strategy_gives_the_factors_of_one_process(strategy, loop, fisher):
    cell, expected = cells_of(strategy, "kinds")[loop, fisher], matrix.KINDS.get((strategy, loop, fisher), "yes")
    if isinstance(cell, str):
        assert cell.startswith(expected)
        return
    assert expected == "yes"
    if fisher in ("exact", "empirical") or strategy == TENSOR:  # a tensor-parallel group draws the same vectors
        assert same(cell, cells_of(ONE, "kinds")[loop, fisher], 1e-5)
        return
    exact = cells_of(ONE, "kinds")[loop, "exact"]
    for layer, (A, G, *counts, edit) in cell.items():
        torch.testing.assert_close(A, exact[layer][0], rtol=1e-5, atol=1e-7)  # inputs know no randomness
        assert (G - exact[layer][1]).norm() < 0.1 * exact[layer][1].norm()  # 50 draws
        assert counts == list(exact[layer][2:4])
        assert abs(edit - exact[layer][4]) < 0.02


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("option", cells.OPTIONS)
@pytest.mark.parametrize("strategy", SHOWN)
def test_every_option_leaves_the_factors_as_they_are(fisher, strategy, option):
    cell, expected = cells_of(strategy, "options")[option, fisher], matrix.OPTIONS.get((option, strategy), "yes")
    if isinstance(cell, str):
        assert cell.startswith(expected)
        return
    assert expected == "yes"
    half = "bf16" in option
    alone = cells_of(ONE, "options")
    # A tensor-parallel sum of two halves rounds otherwise than the whole; so does bfloat16 than float32.
    assert same(cell, alone[option, fisher], 0.05 if half and strategy == TENSOR else 1e-5)
    if "Scheduler" not in option:  # which trains for two epochs
        assert same(cell, alone["plain", fisher], 0.05 if half else 1e-5)


def test_the_page_holds_these_tables():
    page = Path(__file__).parents[2].joinpath("docs", "support.md").read_text(encoding="utf-8")
    assert matrix.tables() in page, "docs/support.md is not what `python -m tests.support.matrix` prints"


def test_processes_with_the_same_data_draw_different_vectors():
    first, second = processes.run(2, cells.random_sums, DDP2)
    for name in first:
        torch.testing.assert_close(first[name][0], second[name][0])
        assert (first[name][1] - second[name][1]).norm() > 0.05 * first[name][1].norm()
