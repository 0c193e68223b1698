"""The page of a run, from whatever is in its folder; the tests of the demos open theirs in a browser."""

import json
from fractions import Fraction

import pytest
import torch
from torch import nn

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.analysis import BandComparison, Detection
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.cli.parser import main
from lightning_curvature.report.page import write_page


@pytest.fixture
def factors():
    torch.manual_seed(0)
    A, G = (rows.T @ rows for rows in (torch.randn(30, 6), torch.randn(30, 4)))
    layers = {f"fc{i}": LayerFactors(A=A + i * torch.eye(6), G=G, num_inputs=30, num_gradients=30) for i in range(4)}
    return KroneckerFactors(layers, {"fisher": "sketched", "note": "<script>alert(1)</script>"})


def test_factors_alone(tmp_path, factors, capsys):
    factors.save(tmp_path / "factors.safetensors")
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out == f"Written to {tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img ") == 4
    assert "2 more layers" in page
    assert "that energy 0.9 keeps" in page
    assert factors.digest() in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "What the edit did" not in page
    assert write_page(tmp_path).read_text() == page  # the same bytes again


def test_an_edited_checkpoint_alone(tmp_path, factors):
    model = nn.ModuleDict({name: nn.Linear(6, 4) for name in factors})
    torch.save(model.state_dict(), tmp_path / "model.pt")
    CurvatureEditor(0.8).edit_checkpoint(tmp_path / "model.pt", factors, tmp_path / "edited.ckpt")
    page = write_page(tmp_path).read_text()
    assert "Edited checkpoint edited.ckpt" in page
    assert factors.digest() in page


def test_a_checkpoint_that_must_not_be_read_is_named(tmp_path, factors):
    factors.save(tmp_path / "factors.safetensors")
    torch.save({"state_dict": {}, "hyper_parameters": Fraction(1, 3)}, tmp_path / "last.ckpt")
    page = write_page(tmp_path).read_text()
    assert "Not read: " in page
    assert "fractions.Fraction" in page


def test_a_report_of_other_metrics(tmp_path):
    row = {"mae": 0.25}
    (tmp_path / "report.json").write_text(json.dumps({"before": row, "after": {"mae": 0.5}}))
    page = write_page(tmp_path).read_text()
    assert "<td>25.0</td>" in page
    assert "<td>50.0</td>" in page


def test_bands_that_do_not_rise_are_named(tmp_path, factors):
    factors.save(tmp_path / "factors.safetensors")
    up, down = (0.5, 0.9, 1.1, 2.0), (0.5, 0.9, 0.8, 2.0)
    Analyses(
        bands=tuple(
            BandComparison(layer, "curvature", False, ratio, ratio, ratio)
            for layer, ratio in (("fc0", up), ("fc1", down))
        ),
        detection={"others": Detection({"share": 1.0}, {"share": (2.0,)}, {"share": (1.0,)})},
    ).save(tmp_path)
    page = write_page(tmp_path).read_text()
    assert "in 1 of 2 layers, and is below 1 in the top band and above 1 in the bottom one in 2." in page
    assert "It does not rise in fc1: top 10 % 0.50, 10 to 25 % 0.90, 25 to 50 % 0.80, bottom 50 % 2.00." in page
    assert "It does not rise in fc0" not in page
    assert "Memorized examples against others" in page


def test_folders_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        write_page(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no report.json, no factors .* and no edited checkpoint"):
        write_page(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"before": {}, "after": 1}'])
def test_a_report_that_is_none(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"report.json: not the report of a run"):
        write_page(tmp_path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"bands": [1], "detection": {}, "directions": [], "windows": {}}']
)
def test_analyses_that_are_none(tmp_path, content, factors):
    factors.save(tmp_path / "factors.safetensors")
    (tmp_path / "analysis.json").write_text(content)
    with pytest.raises(ValueError, match=r"analysis.json: not the analyses of a demo"):
        write_page(tmp_path)


def test_analyses_survive_the_file(tmp_path):
    analyses = Analyses(
        bands=(BandComparison("fc", "svd", True, (1.0, 2.0), (0.5, 1.0), (2.0, 3.0)),),
        detection={"others": Detection({"a": 0.5}, {"a": (1.0, 2.0)}, {"a": (0.0,)})},
        windows={3: "text"},
    )
    analyses.save(tmp_path)
    assert Analyses.load(tmp_path) == analyses
    assert json.loads((tmp_path / "analysis.json").read_text())["bands"][0]["layer"] == "fc"


def test_how_an_edit_was_chosen_and_what_it_changed(tmp_path):
    rows = [
        {"edit": "default layers", "budget": budget, "training error": budget, "validation error": 0.3}
        for budget in (0.0, 0.01, 0.02)
    ]
    counts = {"wrong": 5, "recited": 4, "still": 1, "recovered": 3, "right": 50, "lost": 2}
    report = {
        "before": {"mae": 0.25},
        "after": {"mae": 0.5},
        "choice": {"rows": rows, "name": "default layers", "budget": 0.01, "text": "The edit that closes the gap."},
        "changed": {"0": counts, "1": counts},
    }
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = write_page(tmp_path).read_text()
    assert "The edit that closes the gap." in page
    assert page.count("<img ") == 1
    assert "Of 10 images with a wrong label the model repeats 8 before and 2 after" in page
    assert "6 get their true label. Of 100 images with a right label 4 are lost." in page
