"""Sweeps, their front, and the commands that choose an edit of a saved language model."""

import dataclasses
import json

import pytest
import torch

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.cli.parser import main
from lightning_curvature.collect.passes import collect
from lightning_curvature.report import plots
from lightning_curvature.report.inspection import describe
from lightning_curvature.search.sweep import pareto, read_sweep, sweep
from lightning_curvature.storage import jsonl
from lightning_curvature.text import sequences
from lightning_curvature.text.evaluation import perplexity, strict_rate
from tests.editing.test_scores import random_factors
from tests.support import language

ENERGIES = (0.5, 0.9)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 5))
    return module, KroneckerFactors({"0": random_factors()})


def size(module, calls=None):
    def measure():
        if calls is not None:
            calls.append(1)
        return {"size": float(module[0].weight.detach().norm())}

    return measure


def test_a_sweep_measures_every_edit_and_goes_on(layer, tmp_path):
    module, factors = layer
    weight = module[0].weight.detach().clone()
    editors = {"K-FAC": CurvatureEditor(), "soft": CurvatureEditor(0.3, soft=True)}
    rows = sweep(module, factors, size(module), editors, ENERGIES, tmp_path / "runs" / "s.csv")
    assert torch.equal(module[0].weight, weight)
    assert [(row["edit"], row["energy"]) for row in rows] == [
        ("unedited", 1.0),
        ("K-FAC", 0.5),
        ("K-FAC", 0.9),
        ("soft", 0.5),
        ("soft", 0.9),
    ]
    for row in rows[1:]:
        with CurvatureEditor(row["energy"], soft=row["edit"] == "soft").applied(module, factors):
            assert row["size"] == size(module)()["size"]
    assert read_sweep(tmp_path / "runs" / "s.csv") == rows

    class InterruptedError(Exception):
        pass

    calls = []

    def stops():
        if len(calls) == 3:
            raise InterruptedError
        return size(module, calls)()

    with pytest.raises(InterruptedError):
        sweep(module, factors, stops, editors, ENERGIES, tmp_path / "b.csv")
    assert len(read_sweep(tmp_path / "b.csv")) == 3
    calls.clear()
    assert sweep(module, factors, size(module, calls), editors, ENERGIES, tmp_path / "b.csv") == rows
    assert len(calls) == 2
    # More of it, later; what is there stays.
    more = sweep(module, factors, size(module), {"K-FAC": CurvatureEditor()}, [0.7], tmp_path / "b.csv")
    assert [row["energy"] for row in more] == [1.0, 0.7]
    assert len(read_sweep(tmp_path / "b.csv")) == 6


def test_a_sweep_of_something_else_is_not_mixed_in(layer, tmp_path):
    module, factors = layer
    path, editors = tmp_path / "s.csv", {"a": CurvatureEditor()}
    sweep(module, factors, size(module), editors, ENERGIES, path)
    with pytest.raises(ValueError, match=r"other weights, factors, data or settings \(edit 'a'\)"):
        sweep(module, factors, size(module), {"a": CurvatureEditor(soft=True)}, ENERGIES, path)
    with pytest.raises(ValueError, match=r"metrics \['size'\] were measured first, now \['loss'\].* to another file"):
        sweep(module, factors, lambda: {"loss": 1.0}, {"b": CurvatureEditor(soft=True)}, ENERGIES, path)
    with pytest.raises(ValueError, match=r"other weights, factors, data or settings \(edit 'unedited'\)"):
        sweep(module, factors, size(module), editors, ENERGIES, path, data="another file")
    calls = []
    with pytest.raises(ValueError, match="energy must be in"):
        sweep(module, factors, size(module, calls), editors, [0.5, 90])
    lacking = {"a": CurvatureEditor(), "b": CurvatureEditor(score="coupled")}
    bare = KroneckerFactors({"0": dataclasses.replace(factors["0"], A_coupled=None)})
    with pytest.raises(ValueError, match="score='coupled' needs"):
        sweep(module, bare, size(module, calls), lacking, ENERGIES)
    assert not calls
    numbers = iter("abc")
    with pytest.raises(ValueError, match=r"The metrics \['a'\] were measured first, now \['b'\]"):
        sweep(module, factors, lambda: {next(numbers): 1.0}, editors, ENERGIES)
    with torch.no_grad():
        module[0].bias += 1
    with pytest.raises(ValueError, match=r"other weights, factors, data or settings \(edit 'unedited'\)"):
        sweep(module, factors, size(module), editors, ENERGIES, path)
    with pytest.raises(ValueError, match="at least one editor and one energy"):
        sweep(module, factors, size(module), {}, ENERGIES)
    with pytest.raises(ValueError, match="give the editor another one"):
        sweep(module, factors, size(module), {"unedited": CurvatureEditor()}, ENERGIES)
    with pytest.raises(ValueError, match="Pattern 'x' matches no layer"):
        sweep(module, factors, size(module), {"a": CurvatureEditor(layers=["x"])}, ENERGIES)


def test_the_front_is_what_no_other_row_beats():
    generator = torch.Generator().manual_seed(0)
    rows = [{"a": float(a), "b": float(b)} for a, b in torch.randint(8, (40, 2), generator=generator)]
    rows.append({"a": float("nan"), "b": -1.0})
    expected = [
        row
        for row in rows[:-1]
        if not any(
            (o["a"] < row["a"] and o["b"] >= row["b"]) or (o["a"] <= row["a"] and o["b"] > row["b"]) for o in rows[:-1]
        )
    ]
    front = pareto(rows, minimize=["a"], maximize=["b"])
    assert sorted(front, key=str) == sorted(expected, key=str)
    assert [row["a"] for row in front] == sorted(row["a"] for row in front)
    assert pareto(rows, minimize=["b"])[0]["b"] == -1.0
    with pytest.raises(ValueError, match="A front needs metrics"):
        pareto(rows)
    picture = plots.pareto(
        [{"edit": "unedited", "energy": 1.0, "x": 2.0, "y": 1.0}, {"edit": "a", "energy": 0.5, "x": 3.0, "y": 0.1}],
        [{"edit": "a", "energy": 0.5, "x": 3.0, "y": 0.1}],
        "x",
        "y",
    )
    axes = picture.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.5"]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "not beaten by another", "unedited"]


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model that recites eight of 24 rows, its factors by the names of a wrapper, and files."""
    path = tmp_path_factory.mktemp("choosing")
    rows = language.tokens(24, 16)
    net = language.train(language.model("llama"), rows[:8], 150)
    net.save_pretrained(path / "model")
    language.tokenizer().save_pretrained(path / "model")
    jsonl.write_jsonl(path / "corpus.jsonl", ({"text": language.words(row)} for row in rows[:8].tolist()))
    asked = [sequences.PromptedSequence(tuple(row[:8]), tuple(row[8:])) for row in rows[:8].tolist()]
    sequences.write_sequences(path / "recited.jsonl", asked)
    factors = collect(net, [rows], lambda batch: net(input_ids=batch, labels=batch).loss, layers="mlp")
    KroneckerFactors({f"net.{name}": layer for name, layer in factors.items()}).save(path / "f.safetensors")
    torch.save({"state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}}, path / "a.ckpt")
    return path, net, factors, asked, rows


def run(capsys, *args):
    main([*map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)


def test_sweep_command(saved, tmp_path, capsys):
    path, net, factors, _, _ = saved
    common = (
        "sweep",
        "--model",
        path / "model",
        "--factors",
        path / "f.safetensors",
        "--sequences",
        path / "recited.jsonl",
        "--corpus",
        path / "corpus.jsonl",
        "--out",
        tmp_path / "s",
        "--context",
        "17",
    )
    half = sequences.read_sequences(path / "recited.jsonl", "tuning")
    rows = run(capsys, *common, "--energies", "0.8", "0.99", "--scores", "kfac", "activations")["rows"]
    assert [(row["edit"], row["energy"]) for row in rows[1:]] == [
        ("kfac", 0.8),
        ("kfac", 0.99),
        ("activations", 0.8),
        ("activations", 0.99),
    ]
    for row in rows[1:3]:
        with CurvatureEditor(row["energy"]).applied(net, factors):
            assert row["strict"] == strict_rate(net, half)
            assert row["times"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 1000
    assert len(read_sweep(tmp_path / "s" / "sweep.csv")) == 5
    main([*map(str, common), "--energies", "0.9", "--layers", "net.*.0.mlp.*,*.1.mlp.down_proj", "--layers", "*up*"])
    shown = capsys.readouterr().out
    assert "Not beaten by another one" in shown
    assert "kfac: net.*.0.mlp.*,*.1.mlp.down_proj" in (tmp_path / "s" / "sweep.csv").read_text()
    with pytest.raises(SystemExit, match=r"Pattern 'x\*' matches no layer"):
        main([*map(str, common), "--layers", "x*"])


def test_an_edit_by_what_it_may_cost(saved, tmp_path, capsys):
    path, *_ = saved
    common = (
        "edit",
        "--factors",
        path / "f.safetensors",
        "--perplexity",
        "1.5",
        "--corpus",
        path / "corpus.jsonl",
        "--context",
        "12",
    )
    done = run(capsys, *common, "--checkpoint", path / "model", "--out", tmp_path / "edited")
    target = done["target"]
    assert {layer["energy"] for layer in done["layers"].values()} == {target["energy"]}
    assert 1.4 < target["perplexity"] <= 1.5
    assert target["low"] <= target["held_out"] <= target["high"]
    from lightning_curvature.text.corpus import token_windows
    from lightning_curvature.text.models import load_model

    windows = torch.tensor(list(token_windows(path / "corpus.jsonl", language.tokenizer(), 12)))
    before, after = (perplexity(load_model(folder), windows[::2]) for folder in (path / "model", tmp_path / "edited"))
    assert after / before == pytest.approx(target["perplexity"], rel=1e-4)
    held = [perplexity(load_model(folder), windows[1::2]) for folder in (path / "model", tmp_path / "edited")]
    assert held[1] / held[0] == pytest.approx(target["held_out"], rel=1e-4)
    # The same of a Lightning checkpoint, whose model a folder describes.
    strict = run(
        capsys, *common, "--checkpoint", path / "a.ckpt", "--model", path / "model", "--out", tmp_path / "b.ckpt"
    )
    assert strict["target"]["energy"] == target["energy"]
    plan = run(capsys, *common, "--checkpoint", path / "model", "--out", tmp_path / "c", "--dry-run")
    assert plan["target"]["energy"] == target["energy"]
    for more, message in [
        (("--checkpoint", path / "a.ckpt"), "name the folder of the Hugging Face model"),
        (("--checkpoint", path / "model", "--energy", '{"*": 0.5}'), "give no --energy"),
        (("--checkpoint", path / "model", "--context", "60"), "choose on four at least"),
        (("--checkpoint", path / "model", "--perplexity", "0.9"), "a multiple above 1"),
        (("--checkpoint", path / "model", "--model", path / "other"), "leave --model out"),
        (
            (
                "--checkpoint",
                path / "model",
                "--forget",
                path / "recited.jsonl",
                "--strength",
                "5",
                "--perplexity",
                "1.1",
            ),
            "The bulk step alone makes the perplexity",
        ),
    ]:
        with pytest.raises(SystemExit, match=message):
            main([*map(str, common), *map(str, more), "--out", str(tmp_path / "d")])
    start = [
        "edit",
        "--checkpoint",
        str(path / "model"),
        "--factors",
        str(path / "f.safetensors"),
        "--out",
        str(tmp_path / "d"),
    ]
    with pytest.raises(SystemExit, match="say what the edit may cost"):
        main([*start, "--corpus", str(path / "corpus.jsonl")])
    with pytest.raises(SystemExit, match="windows of 64 tokens; choose on four"):  # as many as the model takes
        main([*start, "--perplexity", "1.1", "--corpus", str(path / "corpus.jsonl")])
    with pytest.raises(SystemExit, match="needs a text to measure it on"):
        main([*start, "--perplexity", "1.1"])


def test_an_edit_against_a_list(saved, tmp_path, capsys):
    path, net, _, asked, _ = saved
    common = (
        "edit",
        "--checkpoint",
        path / "model",
        "--factors",
        path / "f.safetensors",
        "--forget",
        path / "recited.jsonl",
    )
    done = run(
        capsys,
        *common,
        "--strength",
        "0.3",
        "--energy",
        "0.98",
        "--out",
        tmp_path / "edited",
        "--save-delta",
        tmp_path / "d.safetensors",
    )
    assert done["method"] == "bulk step, kfac"
    facts = describe(tmp_path / "edited")["edit"]
    assert facts["provenance"]["forget"] == {"file": "recited.jsonl", "half": None, "sequences": 8}
    assert (facts["strength"], facts["method"]) == (0.3, "bulk step, kfac")
    from lightning_curvature.text.models import load_model

    assert strict_rate(load_model(tmp_path / "edited"), asked) < strict_rate(net, asked)
    both = run(
        capsys,
        *common,
        "--strength",
        "0.05",
        "--score",
        "activations",
        "--soft",
        "--perplexity",
        "3",
        "--corpus",
        path / "corpus.jsonl",
        "--context",
        "12",
        "--out",
        tmp_path / "both",
    )
    assert both["method"] == "bulk step, activations, soft"
    assert both["target"]["perplexity"] <= 3
    main(
        [
            "revert",
            "--checkpoint",
            str(tmp_path / "edited"),
            "--delta",
            str(tmp_path / "d.safetensors"),
            "--out",
            str(tmp_path / "back"),
        ]
    )
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (path / "model" / name).read_bytes()
