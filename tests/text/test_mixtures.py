"""Factors over several files of text: each corpus counts with its weight, whatever its length."""

import json

import pytest
import torch
import transformers as hf

from lightning_curvature import KroneckerFactors
from lightning_curvature.factors.merging import merge_files
from lightning_curvature.text import collecting
from lightning_curvature.text import models as text_models
from lightning_curvature.text.progress import run_key
from tests.support import language

OPTIONS = {"layers": "mlp", "context": 8, "batch_size": 3, "save_every": 2}
BATCHES = {"long.txt": 6, "short.txt": 2}
"""Batches of three windows in each file."""


@pytest.fixture(scope="module")
def texts(folder):
    """Two texts of other words, one of them three times as long."""
    for seed, (name, count) in enumerate(BATCHES.items()):
        (folder / name).write_text(language.words(language.tokens(count, 24, seed=7 + seed).flatten().tolist()))
    return [folder / name for name in BATCHES]


def collected(folder, corpus, out, **options):
    model, tokenizer = text_models.load_model(folder / "model"), text_models.load_tokenizer(folder / "model")
    return collecting.collect_text(model, tokenizer, corpus, out, **OPTIONS | options)


def test_a_mixture_is_the_weighted_mean_of_its_corpora(folder, texts, tmp_path):
    paths = [tmp_path / "long.safetensors", tmp_path / "short.safetensors"]
    long, short = (collected(folder, text, path) for text, path in zip(texts, paths, strict=True))
    for options in ({}, {"weights": [1, 2]}, {"weights": [1, 2], "passes": 2}):
        factors = collected(folder, texts, tmp_path / "f.safetensors", **options)
        weights = options.get("weights", [1, 1])
        assert factors.digest() == merge_files(paths, weights).digest()
        assert factors.digest() == KroneckerFactors.load(tmp_path / "f.safetensors").digest()
        assert factors.fingerprints() == long.fingerprints()
        for name, layer in factors.items():
            for factor in ("A", "G"):
                parts = [getattr(alone[name], factor) for alone in (long, short)]
                expected = (weights[0] * parts[0] + weights[1] * parts[1]) / sum(weights)
                torch.testing.assert_close(getattr(layer, factor), expected)
            assert layer.num_inputs == long[name].num_inputs + short[name].num_inputs
        up, gate = (factors[f"model.layers.0.mlp.{name}_proj"].A for name in ("up", "gate"))
        assert (up is gate) or torch.equal(up, gate)
        assert factors.provenance["fisher"] == "sketched"
        assert factors.provenance["sources"] == [
            {"corpus": "long.txt", "tokens": 144, "batches_skipped": 0, "weight": float(weights[0])},
            {"corpus": "short.txt", "tokens": 48, "batches_skipped": 0, "weight": float(weights[1])},
        ]
    limited = collected(folder, texts, tmp_path / "g.safetensors", tokens=32)
    assert [source["tokens"] for source in limited.provenance["sources"]] == [32, 32]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "f.safetensors",
        "g.safetensors",
        "long.safetensors",
        "short.safetensors",
    ]


def test_a_list_of_one_corpus_is_the_corpus(folder, texts, tmp_path):
    factors = collected(folder, texts[0], tmp_path / "a.safetensors")
    collected(folder, [texts[0]], tmp_path / "b.safetensors", weights=[3])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert factors.provenance["corpus"] == "long.txt"
    assert "sources" not in factors.provenance


@pytest.mark.parametrize(
    ("passes", "stop"), [(1, 1), (1, 5), (1, 7), (1, 8), (1, 9), (2, 7), (2, 9), (2, 13), (2, 14), (2, 15), (2, 17)]
)
def test_an_interrupted_mixture_goes_on_where_it_was(folder, texts, tmp_path, monkeypatch, passes, stop):
    options = {"weights": [1, 2], "passes": passes, "save_every": 1}
    whole = collected(folder, texts, tmp_path / "whole.safetensors", **options)
    total = sum(BATCHES.values()) * passes
    forward_passes = language.interrupt(monkeypatch, stop)
    out = tmp_path / "f.safetensors"
    with pytest.raises(KeyboardInterrupt):
        collected(folder, texts, out, **options)
    assert not out.exists()
    assert collected(folder, texts, out, **options).digest() == whole.digest()
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert len(forward_passes) == total + 2 + (stop > 1)  # loading runs the model once; one batch is done again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.safetensors", "whole.safetensors"]


def test_progress_of_another_mixture_is_refused(folder, texts, tmp_path, monkeypatch):
    out = tmp_path / "f.safetensors"
    language.interrupt(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        collected(folder, texts, out)
    monkeypatch.undo()
    for corpus, weights, said in (
        (texts, [1, 2], r"\['weights'\] differ"),
        (texts[::-1], None, r"\['corpus'\] differ"),
        (texts[0], None, r"\['corpus', 'weights'\] differ"),
    ):
        with pytest.raises(ValueError, match=said):
            collected(folder, corpus, out, weights=weights)


def test_the_key_of_a_run_over_one_corpus_is_that_of_earlier_versions(folder, texts):
    model, tokenizer = language.model("llama"), language.tokenizer()
    key, status = run_key(model, tokenizer, texts[0], tokens=None), texts[0].stat()
    assert run_key(model, tokenizer, [texts[0]], tokens=None) == key
    assert json.loads(key)["corpus"] == [str(texts[0].resolve()), status.st_size, status.st_mtime_ns]
    assert json.loads(key).keys() == {"model", "tokenizer", "corpus", "version of the sums", "tokens"}


def test_what_cannot_be_mixed_is_told_before_the_model_runs(folder, texts, tmp_path, monkeypatch):
    model, tokenizer = text_models.load_model(folder / "model"), text_models.load_tokenizer(folder / "model")
    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", lambda *_, **__: pytest.fail("the model ran"))
    (tmp_path / "tiny.txt").write_text("w1 w2")

    def run(corpus, **options):
        collecting.collect_text(model, tokenizer, corpus, tmp_path / "f.safetensors", **OPTIONS | options)

    with pytest.raises(ValueError, match=r"tiny\.txt: 2 tokens are less than one window of 8"):
        run([texts[0], tmp_path / "tiny.txt"])
    with pytest.raises(ValueError, match="weights must be 2 numbers, one for each, found 3"):
        run(texts, weights=[1, 2, 3])
    with pytest.raises(ValueError, match="weights must be positive numbers, found 0"):
        run(texts, weights=[1, 0])
    with pytest.raises(ValueError, match="There is no corpus to collect over"):
        run([])


def test_the_layers_are_those_of_the_first_corpus(folder, tmp_path):
    """A model whose second MLP runs in windows that hold the token 39, and in no others."""
    model, tokenizer = language.model("llama"), language.tokenizer()
    second, seen = model.model.layers[1].mlp, []
    forward = second.forward
    model.register_forward_pre_hook(
        lambda _, __, given: seen.append(bool((given["input_ids"] == 39).any())), with_kwargs=True
    )
    second.forward = lambda hidden: forward(hidden) if seen[-1] else torch.zeros_like(hidden)
    for name, word in (("without.txt", "w1 w2"), ("with.txt", "w1 w39")):
        (tmp_path / name).write_text(" ".join([word] * 48))
    corpora = [tmp_path / "without.txt", tmp_path / "with.txt"]
    options = OPTIONS | {"layers": "last-mlp"}
    factors = collecting.collect_text(model, tokenizer, corpora, tmp_path / "f.safetensors", **options)
    assert list(factors) == ["model.layers.0.mlp.down_proj"]
