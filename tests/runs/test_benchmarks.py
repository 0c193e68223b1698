"""The benchmarks start, and the one with the most parts runs, in small; what they measure is not looked at here."""

import json
import logging
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    """Run a benchmark as a command does."""
    monkeypatch.syspath_prepend(FOLDER)

    def work(name, *options):
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")

    yield work
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", [path.stem for path in FOLDER.glob("bench_*.py")])
def test_each_says_what_it_does(run, name, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    assert "python benchmarks/" in capsys.readouterr().out


def test_collecting(run, tmp_path, capsys):
    sizes = ("--width", 32, "--depth", 1, "--length", 8, "--rows", 2, "--rounds", 1)
    run("bench_collect", *sizes, "--parts", "training", "memory", "alone", "--out", tmp_path / "out.json")
    told = capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results) == {"environment"} | {
        f"{part}, {kind}" for part in ("training", "memory", "alone") for kind in ("gated", "plain", "vit")
    }
    assert all(len(seconds) == 1 for seconds in results["training, gated"].values())
    assert len(results["alone, vit"]["ours"]) == 2
    for title in ("gated MLP, 32/128, 1 blocks, float32, cpu: in training", "peak memory", "alone"):
        assert title in told
