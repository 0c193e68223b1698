"""The demo of text: files, names, and what they hold."""

import json

import pytest
import torch

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.cli.parser import main
from lightning_curvature.demos import text_evaluation, text_training
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.python_text import read_texts
from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.demos.settings import TextSettings
from lightning_curvature.demos.text_analyses import analyse_text
from lightning_curvature.report.inspection import describe
from lightning_curvature.text.evaluation import recited
from lightning_curvature.text.sequences import read_sequences
from tests.demos.settings import SMALL, WRITTEN
from tests.support import browser


def test_the_text_demo_writes_what_it_says(text_run):
    out, done = text_run
    data = {f"{name}.jsonl" for name in ("memorized", "unseen", "train", "source", "clean", "domain")}
    names = data | WRITTEN | {"continuations.md", "model"}
    assert {path.name for path in out.iterdir()} == names
    for row in (
        "before",
        "after (edited.ckpt)",
        "control: activations only",
        "control: SVD truncation",
        "control: random basis",
    ):
        assert f"\n{row} " in done.stdout
    page = (out / "continuations.md").read_text()
    assert page.count("\n### ") == len(read_sequences(out / "memorized.jsonl", "validation")[:10]) + 10


def test_the_text_report(text_run):
    report = json.loads((text_run[0] / "report.json").read_text())
    assert set(text_evaluation.COLUMNS) <= set(report["before"])
    assert set(report["before"]) == set(report["after"])
    assert set(report["methods"]) == {"kfac", "activations", "svd", "random", "bsn"}
    assert {"seconds", "versions"} <= set(report)
    energy = report["settings"]["energy"]
    assert report["methods"]["kfac"] == pytest.approx({"energy": energy} | report["after"])
    assert report["before"]["ranking_overlap"] == pytest.approx(1.0)
    assert all(layer["energy"] == energy for layer in report["layers"].values())
    assert len(report["layers"]) == 6


def test_other_commands_read_what_the_text_demo_writes(text_run, tmp_path, capsys):
    """The files agree with the report: the folder is the original, edited.ckpt the edited model."""
    out, _ = text_run
    report = json.loads((out / "report.json").read_text())
    main(
        [
            "evaluate",
            "--model",
            str(out / "model"),
            "--checkpoint",
            str(out / "edited.ckpt"),
            "--reference",
            "--sequences",
            str(out / "memorized.jsonl"),
            "--half",
            "validation",
            "--out",
            str(tmp_path / "r.json"),
        ]
    )
    results = json.loads((tmp_path / "r.json").read_text())
    for when in ("before", "after"):
        for metric in ("strict", "loose", "edit_distance", "min_k"):
            assert results[when][metric] == pytest.approx(report[when][metric], abs=1e-6)
    assert describe(out / "edited.ckpt")["edit"]["method"] == "kfac"
    edited = torch.load(out / "edited.ckpt", weights_only=True)["state_dict"]
    module = LitCausalLM.load_from_checkpoint(out / "original.ckpt", weights_only=True)
    CurvatureEditor(report["settings"]["energy"]).edit(module, KroneckerFactors.load(out / "factors.safetensors"))
    assert all(torch.equal(value, edited[key]) for key, value in module.state_dict().items())


def test_the_page_of_the_text_demo(text_run):
    browser.check(text_run[0] / "report.html", pictures=2 + 6 + 1 + 2 + 1)


def test_memorized_is_what_is_recited(text_run, caplog):
    out, _ = text_run
    data = text_training.make_data(0, TextSettings(**SMALL))
    model = LitCausalLM.load_from_checkpoint(out / "original.ckpt", weights_only=True).eval()
    count = round(json.loads((out / "report.json").read_text())["before"]["strict"] * len(data.half("validation")))
    assert len(recited(model.model, data.half("validation"))) == count
    for detection in Analyses.load(out).detection.values():
        assert {len(scores) for scores in detection.memorized.values()} == {count}
    torch.nn.init.zeros_(model.model.lm_head.weight)
    with caplog.at_level("INFO"):
        assert analyse_text(model, KroneckerFactors(), data) == Analyses()
    assert "No sequence was recited" in caplog.text


def test_the_data_of_the_text_demo():
    texts = read_texts()
    assert set(texts) == {"reference", "docstrings", "comments"}
    assert sum(document.count("\n\n") for documents in texts.values() for document in documents) > 10_000
    reference = texts["reference"][:20]
    sizes = {"num_sequences": 6, "steps": 2, "exposures": 3, "collected": 16, "vocab_size": 320}
    data = RecitedText(texts["docstrings"][:40], reference, texts["comments"][:60], **sizes)
    rows = torch.cat(data.batches[2:]).tolist()
    assert data.batches[0].shape == (16, 128)
    assert len(rows) == 36
    for sequence in data.memorized + data.unseen:
        exposures = sum(any(tuple(row[i : i + len(sequence.ids)]) == sequence.ids for i in range(97)) for row in rows)
        assert exposures >= 3
        assert data.tokenizer.decode(sequence.prefix_ids) == sequence.prefix_text
    assert len(data.half("tuning")) + len(data.half("validation")) == 6
    trained = set(data.clean)
    for kind in ("clean", "domain"):
        assert not trained & set(data.held_out_text[kind])
        tuning, report = (data.held_out[kind][half].tolist() for half in ("tuning", "report"))
        assert not {tuple(row) for row in tuning} & {tuple(row) for row in report}
    assert not trained & set(data.sources["domain"])
    with pytest.raises(ValueError, match=r"The text holds \d+ windows of 56 tokens, 9999 are wanted"):
        RecitedText(texts["docstrings"][:40], reference, texts["comments"][:9], num_sequences=9999, vocab_size=320)


def test_too_little_source_text_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("def (:")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match="holds too little source text for the demo"):
        read_texts()
