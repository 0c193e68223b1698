"""The analyses of both demos, and detection on what they write."""

import csv
import json

import pytest
import torch

from lightning_curvature import KroneckerFactors
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.cli.parser import main
from lightning_curvature.demos.digits import NoisyDigits
from lightning_curvature.text.detection import window_scores
from lightning_curvature.text.models import load_model, load_tokenizer
from lightning_curvature.text.sequences import read_sequences


def test_the_analyses_of_both_demos(run, text_run):
    images, texts = (Analyses.load(out) for out, _ in (run, text_run))
    (fc2,) = {comparison.layer for comparison in images.bands}
    assert fc2 == "model.blocks.1.fc2"
    assert len(images.bands) == 4
    assert len(texts.bands) == 4 * 6
    (detection,) = images.detection.values()
    assert set(detection.auroc) == {
        *(f"{kind}, {fc2}" for kind in ("flat share", "random basis", "activation norm")),
        "loss",
        "negative margin",
    }
    assert list(texts.detection) == ["never-memorized text of the same domain", "ordinary text"]
    layers = [f"model.layers.{block}.mlp.{projection}_proj" for block in (0, 1) for projection in ("gate", "down")]
    for detection in texts.detection.values():
        kinds = ("flat share", "random basis", "activation norm")
        assert set(detection.auroc) == {f"{kind}, {layer}" for kind in kinds for layer in layers} | {
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
    renamed = KroneckerFactors({name.removeprefix("model."): layer for name, layer in factors.items()})
    model = load_model(out / "model")
    expected = window_scores(model, renamed, windows)
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
