"""The demo of digits: files, names, and what they hold."""

import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.demos import label_noise
from lightning_curvature.demos.analyses import analyse_images
from lightning_curvature.demos.digits import NoisyDigits, build_model
from lightning_curvature.demos.noise import noise_labels
from lightning_curvature.demos.vit import LitViT
from lightning_curvature.report.inspection import describe
from tests.demos.settings import WRITTEN
from tests.support import browser


def test_the_demo_writes_what_it_says(run):
    out, done = run
    names = WRITTEN | {"examples.png", "directions.png"}
    assert {path.name for path in out.iterdir()} == names
    assert "model.blocks.1.fc2" in done.stderr
    assert done.stderr.count("`Trainer.fit` stopped") == 1
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
    edit = describe(out / "edited.ckpt")["edit"]
    assert {name: layer["energy"] for name, layer in edit["layers"].items()} == dict.fromkeys(
        report["layers"], report["settings"]["energy"]
    )
    assert edit["factors"] == KroneckerFactors.load(out / "factors.safetensors").digest()
    assert describe(out / "original.ckpt")["edit"] is None


def test_the_page_of_the_digits_demo(run):
    browser.check(run[0] / "report.html", pictures=10)


def test_nothing_memorized_is_nothing_to_analyse(caplog):
    data = NoisyDigits()
    train, _ = data.halves()["report"]
    right = TensorDataset(train.tensors[0], train.tensors[2], train.tensors[2])
    with caplog.at_level("INFO"):
        assert analyse_images(build_model(), KroneckerFactors(), right) == Analyses()
    assert "No wrong label was memorized" in caplog.text


def test_the_report_says_how_the_edit_was_chosen_and_which_answers_changed(run):
    report = json.loads((run[0] / "report.json").read_text())
    choice = report["choice"]
    assert {row["edit"] for row in choice["rows"]} == {"default layers", "all linear layers, soft"}
    assert choice["name"] in {row["edit"] for row in choice["rows"]}
    assert report["moved"]
    rows = report["changed"].values()
    total = {name: sum(row[name] for row in rows) for name in ("wrong", "recited", "still", "right", "lost")}
    assert total["wrong"] == report["counts"]["noised"]
    assert total["right"] == report["counts"]["clean"]
    assert total["recited"] / total["wrong"] == pytest.approx(report["before"]["memorized"])
    assert total["still"] / total["wrong"] == pytest.approx(report["default"]["memorized"])


def test_changed_answers_by_class():
    clean, noised = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1, 1, 0, 1, 1])
    before, after = torch.tensor([1, 1, 0, 1, 0]), torch.tensor([0, 1, 1, 1, 1])
    rows = label_noise.changed_answers(TensorDataset(torch.zeros(5), noised, clean), before, after)
    assert rows["0"] == {"wrong": 2, "recited": 2, "still": 1, "recovered": 1, "right": 1, "lost": 1}
    assert rows["1"] == {"wrong": 0, "recited": 0, "still": 0, "recovered": 0, "right": 2, "lost": 0}


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
    results = label_noise.evaluate(model, TensorDataset(x, noised, clean), TensorDataset(x, clean))
    assert results == pytest.approx(expected)


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


def test_asymmetric_noise_names_each_class_as_the_next_one():
    labels = torch.arange(10).repeat(20)
    noised = noise_labels(labels, 0.2, 10, torch.Generator().manual_seed(0), asymmetric=True)
    wrong = noised != labels
    assert int(wrong.sum()) == 40
    assert torch.equal(noised[wrong], (labels[wrong] + 1) % 10)
    data = NoisyDigits(noise=0.2, asymmetric=True)
    shifts = (data.train.tensors[1] - data.train.tensors[2]) % 10
    assert shifts.unique().tolist() == [0, 1]
