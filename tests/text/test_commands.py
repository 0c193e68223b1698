"""The commands collect, mine and evaluate on a saved language model."""

import json

import pytest

from lightning_curvature import KroneckerFactors
from lightning_curvature.cli.parser import main
from lightning_curvature.text import sequences
from tests.support import language


def run(*args):
    main([str(arg) for arg in args])


def test_collect_command(folder, tmp_path, capsys):
    out = tmp_path / "f.safetensors"
    run(
        "collect",
        "--model",
        folder / "model",
        "--corpus",
        folder / "corpus.jsonl",
        "--out",
        out,
        "--context",
        8,
        "--layers",
        "model.layers.1.mlp.up*",
        "model.layers.1.mlp.[gd]*",
        "--passes",
        2,
    )
    assert len(KroneckerFactors.load(out)) == 3
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out


def test_mine_command(folder, tmp_path, capsys):
    out = tmp_path / "mined.jsonl"
    arguments = ("mine", "--model", folder / "model", "--corpus", folder / "corpus.jsonl", "--out", out)
    run(*arguments, "--prefix", 8, "--suffix", 8)
    assert len(sequences.read_sequences(out)) == 8
    assert "8 recited sequences (" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"Error: .*its longest document has 17 tokens, a window has 64"):
        run(*arguments, "--overwrite")
    untrained = folder / "untrained"
    language.model("llama").save_pretrained(untrained)
    language.tokenizer().save_pretrained(untrained)
    out.unlink()
    with pytest.raises(SystemExit, match=r"recites none of them; nothing was written"):
        run("mine", "--model", untrained, *arguments[3:], "--prefix", 8, "--suffix", 8)
    assert not out.exists()


def test_evaluate_command(folder, edited, tmp_path, capsys):
    files = (
        "--sequences",
        folder / "sequences.jsonl",
        "--corpus",
        folder / "corpus.jsonl",
        "--recall",
        folder / "recall.jsonl",
        "--context",
        16,
    )
    run("evaluate", "--model", folder / "model", *files)
    shown = capsys.readouterr().out
    assert "strict" in shown
    assert "perplexity" in shown
    assert "ranking_overlap" not in shown
    out, page = tmp_path / "r.json", tmp_path / "examples.md"
    run(
        "evaluate",
        "--model",
        folder / "model",
        "--checkpoint",
        edited,
        "--reference",
        *files,
        "--stress",
        "--out",
        out,
        "--examples",
        page,
    )
    results = json.loads(out.read_text())
    assert results["before"]["strict"] == 0.5
    assert results["after"]["strict"] == 0.0
    assert results["before"]["ranking_overlap"] == pytest.approx(1.0)
    assert results["after"]["ranking_overlap"] < 0.6
    assert results["after"]["perplexity"] != results["before"]["perplexity"]
    assert {"strict_shift_+4", "exact_prefix_shift_-4", "recall"} <= set(results["after"])
    assert page.read_text().count("before (recited)") >= 5
    assert "## Ordinary text" in page.read_text()
    run(
        "evaluate",
        "--model",
        folder / "model",
        "--checkpoint",
        edited,
        "--reference",
        *files[:2],
        "--half",
        "validation",
        "--examples",
        page,
        "--overwrite",
    )
    assert "Ordinary" not in page.read_text()


def test_evaluate_command_errors(folder, edited, tmp_path):
    model = ("evaluate", "--model", folder / "model")
    for arguments, message in [
        ([], "Nothing to measure on: give at least one of"),
        (["--corpus", folder / "corpus.jsonl", "--context", 8, "--stress"], "stress test needs sequences"),
        (["--sequences", folder / "sequences.jsonl", "--reference"], "name the edited checkpoint"),
        (["--sequences", folder / "sequences.jsonl", "--examples", tmp_path / "x.md"], "it needs --reference"),
        (["--sequences", tmp_path / "none.jsonl"], "No such file"),
        (["--corpus", folder / "corpus.jsonl", "--context", 100], "Windows of 100 tokens are longer than the model's"),
        (["--corpus", folder / "corpus.jsonl", "--context", 4000], "less than one window of 4000"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(*model, *arguments)
    with pytest.raises(SystemExit, match="none is no folder"):
        run("collect", "--model", tmp_path / "none", "--corpus", folder / "corpus.jsonl", "--out", tmp_path / "f")
