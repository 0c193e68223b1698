"""The demo and the command line, with a handful of epochs: files, names, and what they hold."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.cli.parser import main
from lightning_curvature.demos import label_noise, text_evaluation, text_training
from lightning_curvature.demos.analyses import analyse_images
from lightning_curvature.demos.digits import NoisyDigits, build_model, run_digits
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.noise import noise_labels
from lightning_curvature.demos.python_text import read_texts
from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.demos.settings import TextSettings
from lightning_curvature.demos.text_analyses import analyse_text
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.report.inspection import describe
from lightning_curvature.text.detection import window_scores
from lightning_curvature.text.evaluation import recited
from lightning_curvature.text.models import load_model, load_tokenizer
from lightning_curvature.text.sequences import read_sequences
from tests import browser


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "lightning_curvature", "demo", "digits", "--out", str(out), "--epochs", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out, done


def test_the_demo_writes_what_it_says(run):
    out, done = run
    names = {
        "original.ckpt",
        "original-edited.ckpt",
        "original-edited-factors.safetensors",
        "edited.ckpt",
        "factors.safetensors",
        "report.json",
        "logs",
        "spectrum.png",
        "energy.png",
        "examples.png",
        "directions.png",
        "analysis.json",
        "report.html",
    }
    assert {path.name for path in out.iterdir()} == names
    assert "model.blocks.1.fc2" in done.stderr
    for row in ("before", "after (edited.ckpt)", "control: SVD truncation", "control: random basis"):
        assert f"\n{row} " in done.stdout
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in names if name.endswith(".png"))


def test_the_report_holds_before_after_and_controls(run):
    report = json.loads((run[0] / "report.json").read_text())
    assert set(report["before"]) == set(report["after"]) == set(label_noise.METRICS)
    assert set(report["methods"]) == {"kfac", "activations", "svd", "random", "bsn"}
    assert {"seconds", "versions"} <= set(report)
    subnet = report["methods"].pop("bsn")
    assert set(subnet) == {"ratio", *label_noise.METRICS}
    assert subnet["ratio"] in label_noise.RATIOS
    assert subnet["memorized"] < report["before"]["memorized"]
    for method, row in report["methods"].items():
        energy = row["energy"]
        assert row == {"energy": energy} | report["curves"]["report"][method][str(energy)]
        assert energy == label_noise.choose_energy({float(e): m for e, m in report["curves"]["tuning"][method].items()})
    chosen = report["methods"]["kfac"]
    assert report["after"] == {metric: chosen[metric] for metric in label_noise.METRICS}


def test_the_checkpoints_are_what_the_report_measured(run):
    out, _ = run
    report = json.loads((out / "report.json").read_text())
    data = NoisyDigits()
    train, val = data.halves()["report"]
    for name, expected in (("original", "before"), ("edited", "after")):
        model = LitViT.load_from_checkpoint(out / f"{name}.ckpt", weights_only=True)
        assert label_noise.evaluate(model, train, val) == pytest.approx(report[expected])
    model = LitViT.load_from_checkpoint(out / "original.ckpt", weights_only=True)
    CurvatureEditor(report["settings"]["energy"]).edit(model, KroneckerFactors.load(out / "factors.safetensors"))
    edited = torch.load(out / "edited.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, edited[key]) for key, value in model.state_dict().items())


def test_the_edited_checkpoint_says_what_was_edited(run):
    out, _ = run
    report = json.loads((out / "report.json").read_text())
    found = describe(out / "edited.ckpt")["edit"]
    assert {name: layer["energy"] for name, layer in found["layers"].items()} == dict.fromkeys(
        report["layers"], report["settings"]["energy"]
    )
    assert found["factors"] == KroneckerFactors.load(out / "factors.safetensors").digest()
    assert describe(out / "original.ckpt")["edit"] is None


def test_the_page_of_the_digits_demo(run):
    browser.check(run[0] / "report.html", pictures=8)


# The text demo -------------------------------------------------------------------------------------------------------

SMALL = {"sequences": 12, "steps": 3, "exposures": 100, "collected": 32, "hidden": 128, "layers": 2, "vocab_size": 320}


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    sizes = [argument for name, value in SMALL.items() for argument in (f"--settings.{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "lightning_curvature",
        "demo",
        "text",
        "--out",
        str(out),
        "--compare",
        *sizes,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out, done


def test_the_text_demo_writes_what_it_says(text_run):
    out, done = text_run
    data = {f"{name}.jsonl" for name in ("memorized", "unseen", "train", "source", "clean", "domain")}
    names = data | {
        "original.ckpt",
        "original-edited.ckpt",
        "original-edited-factors.safetensors",
        "edited.ckpt",
        "factors.safetensors",
        "report.json",
        "logs",
        "spectrum.png",
        "energy.png",
        "continuations.md",
        "model",
        "analysis.json",
        "report.html",
    }
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


def test_the_analyses_of_both_demos(run, text_run):
    images, texts = (Analyses.load(out) for out, _ in (run, text_run))
    (fc2,) = {one.layer for one in images.bands}
    assert fc2 == "model.blocks.1.fc2"
    assert len(images.bands) == 4
    assert len(texts.bands) == 4 * 6
    (found,) = images.detection.values()
    assert set(found.auroc) == {
        *(f"{kind}, {fc2}" for kind in ("flat share", "random basis", "activation norm")),
        "loss",
        "negative margin",
    }
    assert list(texts.detection) == ["never-memorized text of the same domain", "ordinary text"]
    layers = [f"model.layers.{block}.mlp.{projection}_proj" for block in (0, 1) for projection in ("gate", "down")]
    for found in texts.detection.values():
        kinds = ("flat share", "random basis", "activation norm")
        assert set(found.auroc) == {f"{kind}, {layer}" for kind in kinds for layer in layers} | {
            "likelihood",
            "margin",
            "min-k",
        }
    for analyses in (images, texts):
        assert [use.flat for use in analyses.directions] == [False, True]
    assert all(index in texts.windows for use in texts.directions for top in use.top for index in top)
    train, _ = NoisyDigits().halves()["report"]
    wrong = train.tensors[1] != train.tensors[2]
    for use in images.directions:
        for top, precision in zip(use.top, use.precision, strict=True):
            assert precision == pytest.approx(float(wrong[list(top)].double().mean()))


def test_nothing_memorized_is_nothing_to_analyse(caplog):
    data = NoisyDigits()
    train, _ = data.halves()["report"]
    right = TensorDataset(train.tensors[0], train.tensors[2], train.tensors[2])
    with caplog.at_level("INFO"):
        assert analyse_images(build_model(), KroneckerFactors(), right) == Analyses()
    assert "No wrong label was memorized" in caplog.text


def test_memorized_is_what_is_recited(text_run, caplog):
    out, _ = text_run
    data = text_training.make_data(0, TextSettings(**SMALL))
    model = LitCausalLM.load_from_checkpoint(out / "original.ckpt", weights_only=True).eval()
    count = round(json.loads((out / "report.json").read_text())["before"]["strict"] * len(data.half("validation")))
    assert len(recited(model.model, data.half("validation"))) == count
    for found in Analyses.load(out).detection.values():
        assert {len(scores) for scores in found.memorized.values()} == {count}
    torch.nn.init.zeros_(model.model.lm_head.weight)
    with caplog.at_level("INFO"):
        assert analyse_text(model, KroneckerFactors(), data) == Analyses()
    assert "No sequence was recited" in caplog.text


def test_detection_on_what_the_text_demo_writes(text_run, tmp_path, capsys):
    out, _ = text_run
    common = [
        "detect",
        "--model",
        str(out / "model"),
        "--factors",
        str(out / "factors.safetensors"),
        "--out",
        str(tmp_path / "ranked.csv"),
        "--overwrite",
    ]
    main([*common, "--sequences", str(out / "memorized.jsonl")])
    assert "12 examples written to" in capsys.readouterr().out
    with (tmp_path / "ranked.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["rank", "score", "likelihood", "margin", "min-k", "window", "text"]
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    sequences = read_sequences(out / "memorized.jsonl")
    windows = torch.tensor([sequence.ids for sequence in sequences])
    factors = KroneckerFactors.load(out / "factors.safetensors")
    own = KroneckerFactors({name.removeprefix("model."): layer for name, layer in factors.items()})
    model = load_model(out / "model")
    expected = window_scores(model, own, windows)
    loss = torch.nn.functional.cross_entropy(
        model(windows[:, :-1]).logits.transpose(1, 2), windows[:, 1:], reduction="none"
    ).mean(1)
    for row in rows:
        index = int(row["window"])
        last = "flat share, model.layers.1.mlp.down_proj"
        assert float(row["score"]) == pytest.approx(float(expected[last][index]), rel=1e-4)
        assert float(row["likelihood"]) == pytest.approx(-float(loss[index].detach()), rel=1e-4)
        for name in ("margin", "min-k"):
            assert float(row[name]) == pytest.approx(float(expected[name][index]), rel=1e-4)
        assert row["text"] == load_tokenizer(out / "model").decode(sequences[index].ids)
    main(
        [
            *common,
            "--corpus",
            str(out / "clean.jsonl"),
            "--tokens",
            "640",
            "--context",
            "32",
            "--json",
            "--layer",
            "model.model.layers.0.mlp.up_proj",
        ]
    )
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 20
    with pytest.raises(SystemExit, match="either --sequences or --corpus"):
        main(common)
    with pytest.raises(SystemExit, match="--positions first is for images"):
        main([*common, "--sequences", str(out / "memorized.jsonl"), "--positions", "first"])
    with pytest.raises(SystemExit, match=r"hold no layer 'layers.0'"):
        main([*common, "--sequences", str(out / "memorized.jsonl"), "--layer", "layers.0"])
    (tmp_path / "mixed.jsonl").write_text(
        "".join(json.dumps({"prefix_ids": [5, 6], "suffix_ids": [7] * count}) + "\n" for count in (1, 2))
    )
    with pytest.raises(SystemExit, match="sequences of 3 to 4 tokens cannot be compared"):
        main([*common, "--sequences", str(tmp_path / "mixed.jsonl")])


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
        found = sum(any(tuple(row[i : i + len(sequence.ids)]) == sequence.ids for i in range(97)) for row in rows)
        assert found >= 3
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


def test_evaluate_against_a_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    x, noised, clean = torch.randn(40, 2, 2), torch.randint(3, (40,)), torch.randint(3, (40,))
    answers = model(x).argmax(1)
    wrong = [i for i in range(40) if noised[i] != clean[i]]
    right = [i for i in range(40) if noised[i] == clean[i]]
    expected = {
        "memorized": sum(int(answers[i] == noised[i]) for i in wrong) / len(wrong),
        "recovered": sum(int(answers[i] == clean[i]) for i in wrong) / len(wrong),
        "clean_train": sum(int(answers[i] == clean[i]) for i in right) / len(right),
        "val_accuracy": sum(int(answers[i] == clean[i]) for i in range(40)) / 40,
    }
    found = label_noise.evaluate(model, TensorDataset(x, noised, clean), TensorDataset(x, clean))
    assert found == pytest.approx(expected)


def test_energy_is_the_least_memorized_where_none_reaches_the_limit():
    curve = {0.5: {"memorized": 0.4, "val_accuracy": 0.1}, 0.9: {"memorized": 0.5, "val_accuracy": 0.9}}
    assert label_noise.choose_energy(curve) == 0.5


def test_noise_and_halves():
    labels = torch.arange(10).repeat(20)
    noised = noise_labels(labels, 0.1, 10, torch.Generator().manual_seed(0))
    assert int((noised != labels).sum()) == 20
    assert noised.min() >= 0
    assert noised.max() <= 9
    data = NoisyDigits(seed=3)
    assert (len(data.train), len(data.val)) == (1297, 500)
    assert int((data.train.tensors[1] != data.train.tensors[2]).sum()) == 130
    tuning, report = data.halves().values()
    assert len(tuning[0]) + len(report[0]) == 1297
    assert torch.equal(tuning[1].tensors[0], data.val.tensors[0][::2])


def test_command_line_errors(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "digits"])
    assert stop.value.code == 2
    assert "out" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.delitem(sys.modules, "lightning_curvature.demos.digits")
    with pytest.raises(SystemExit, match=r"pip install 'lightning_curvature\[demo\]'"):
        main(["demo", "digits", "--out", str(tmp_path)])
    assert callable(run_digits)


def test_importing_the_package_imports_no_extra():
    code = """
import sys, lightning.pytorch, torchmetrics, einops, safetensors.torch, tabulate
before = set(sys.modules)
import lightning_curvature
heavy = {"transformers", "torchvision", "matplotlib", "sklearn", "jsonargparse"}
print(sorted(heavy & ({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
