"""Factors over a file of text, interrupted and resumed."""

import pytest
import torch

from lightning_curvature import KroneckerFactors
from lightning_curvature.collect.passes import collect
from lightning_curvature.text import collecting, corpus
from lightning_curvature.text import models as text_models
from tests.support import language

OPTIONS = {"layers": "mlp", "context": 8, "batch_size": 3, "save_every": 2}


def same(factors, expected):
    assert list(factors) == list(expected)
    for name, layer in factors.items():
        assert torch.equal(layer.A, expected[name].A)
        assert torch.equal(layer.G, expected[name].G)
        assert layer.num_inputs == expected[name].num_inputs
        assert layer.num_seen == expected[name].num_seen


def collected(folder, out, **options):
    model, tokenizer = text_models.load_model(folder / "model"), text_models.load_tokenizer(folder / "model")
    return collecting.collect_text(model, tokenizer, folder / "corpus.jsonl", out, **OPTIONS | options)


def test_a_saved_model_over_a_file(folder, tmp_path):
    factors = collected(folder, tmp_path / "f.safetensors")
    net, tokenizer = text_models.load_model(folder / "model"), text_models.load_tokenizer(folder / "model")
    rows = torch.tensor(list(corpus.token_windows(folder / "corpus.jsonl", tokenizer, 8)))
    step = lambda batch: net(input_ids=batch, labels=batch).loss  # noqa: E731
    expected = collect(net, torch.split(rows, 3), step, layers="mlp")
    same(factors, expected)
    same(factors, KroneckerFactors.load(tmp_path / "f.safetensors"))
    assert factors.provenance["corpus"] == "corpus.jsonl"
    assert factors.provenance["tokens"] == rows.numel()
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    limited = collected(folder, tmp_path / "g.safetensors", tokens=50)
    assert next(iter(limited.values())).num_seen == 48
    same(collected(folder, tmp_path / "h.safetensors", accumulate_on="cpu"), factors)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("stop", [1, 3, 6, 9, 17])
def test_an_interrupted_collection_goes_on_where_it_was(folder, tmp_path, monkeypatch, passes, stop):
    whole = collected(folder, tmp_path / "whole.safetensors")
    forward_passes = language.interrupt(monkeypatch, stop)
    out = tmp_path / "f.safetensors"
    total = 12 * passes
    if stop <= total:
        with pytest.raises(KeyboardInterrupt):
            collected(folder, out, passes=passes)
        assert not out.exists()
    factors = collected(folder, out, passes=passes)
    same(factors, whole)
    # Loading runs the model once, and is done twice; at most two batches since the last save are done again.
    assert len(forward_passes) <= total + 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.safetensors", "whole.safetensors"]


def test_progress_of_another_run_is_refused(folder, tmp_path, monkeypatch):
    out = tmp_path / "f.safetensors"
    tokenizer = text_models.load_tokenizer(folder / "model")

    def run(net, **options):
        collecting.collect_text(net, tokenizer, folder / "corpus.jsonl", out, **OPTIONS | options)

    net = text_models.load_model(folder / "model")
    language.interrupt(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        run(net)
    monkeypatch.setattr(collecting, "tqdm", pytest.fail)
    with pytest.raises(ValueError, match=r"progress of another run: \['context', 'fisher'\] differ. Finish that run"):
        run(net, context=16, fisher="sampled")
    with pytest.raises(ValueError, match=r"\['model'\] differ"):
        run(language.model("llama", seed=3))
    monkeypatch.setattr("lightning_curvature.text.progress.STATE_VERSION", 0)
    with pytest.raises(ValueError, match=r"\['version of the sums'\] differ"):
        run(net)
    monkeypatch.undo()
    tokenizer = language.tokenizer(39)
    with pytest.raises(ValueError, match=r"\['tokenizer'\] differ"):
        run(net)
    tokenizer = language.tokenizer()
    text = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text(text[::-1])  # as long as before
    with pytest.raises(ValueError, match=r"\['corpus'\] differ"):
        run(net)
    (folder / "corpus.jsonl").write_text(text)


def test_what_cannot_be_collected(folder, tmp_path):
    with pytest.raises(ValueError, match="context=128 is longer than the model's, 64 tokens"):
        collected(folder, tmp_path / "f", context=128)
    with pytest.raises(ValueError, match="context=1: in a window of so many tokens there is nothing to predict"):
        collected(folder, tmp_path / "f", context=1)
    with pytest.raises(ValueError, match="passes must be an integer of at least 1"):
        collected(folder, tmp_path / "f", passes=0)
    with pytest.raises(ValueError, match="6 layers cannot be cut into 7 groups; use at most 6 passes"):
        collected(folder, tmp_path / "f", passes=7)
    with pytest.raises(RuntimeError, match=r"factors of layers 'model.* rest on no position"):
        collected(folder, tmp_path / "f", share=1e-9)
    (tmp_path / "f.partial").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="positions must be one of"):
        collected(folder, tmp_path / "f", positions="mask:x")
    with pytest.raises(ValueError, match="accumulate_on must be one of"):
        collected(folder, tmp_path / "f", accumulate_on="disk")
    net, tokenizer = language.model("llama"), language.tokenizer()
    with torch.no_grad():
        net.model.norm.weight.fill_(float("nan"))
    with (
        pytest.warns(UserWarning, match="NaN or infinite"),
        pytest.raises(RuntimeError, match="No batch was collected"),
    ):
        collecting.collect_text(net, tokenizer, folder / "corpus.jsonl", tmp_path / "f", **OPTIONS)
