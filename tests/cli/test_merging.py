"""Factors of several texts by the command line: ``collect`` with several corpora, and ``merge``."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_curvature import KroneckerFactors
from tests.support import language
from tests.support.commands import arguments, run
from tests.support.factors import layer


@pytest.fixture
def files(tmp_path):
    for number, name in enumerate(("a", "b")):
        facts = {"fisher": "sketched", "corpus": f"{name}.txt"}
        KroneckerFactors({"fc": layer(number, n=10 + 90 * number)}, facts).save(tmp_path / f"{name}.safetensors")
    return [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]


def test_merge(files, tmp_path, capsys):
    out = tmp_path / "c.safetensors"
    first, second = (KroneckerFactors.load(path) for path in files)
    run("merge", *files, "--out", out)
    assert "110" in capsys.readouterr().out
    merged = KroneckerFactors.load(out)
    torch.testing.assert_close(merged["fc"].A, (10 * first["fc"].A + 100 * second["fc"].A) / 110)
    run("merge", *files, "--out", out, "--weights", 1, 2, "--overwrite", "--json")
    facts = {"shape": [2, 3], "num_inputs": 110, "num_seen": 110}
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "layers": {"fc": facts}}
    merged = KroneckerFactors.load(out)
    torch.testing.assert_close(merged["fc"].G, (first["fc"].G + 2 * second["fc"].G) / 3)
    assert merged.provenance["sources"][1] == {"file": "b.safetensors", "corpus": "b.txt", "weight": 2.0}
    run("inspect", out)
    assert "b.txt" in capsys.readouterr().out


def test_what_cannot_be_merged(files, tmp_path, folder):
    out = ("--out", tmp_path / "c.safetensors")
    for args, said in (
        ([files[0], *out], "name two factor files or more, found 1"),
        ([files[0], tmp_path / "none.safetensors", *out], r"No such file: .*none\.safetensors \(PATHS\)"),
        ([files[0], tmp_path, *out], r"PATHS .* is a folder; it names a file"),
        ([files[0], folder / "w.safetensors", *out], r"w\.safetensors: not a complete factor file \(it holds weights"),
        ([files[0], folder / "broken.safetensors", *out], r"broken\.safetensors: not a complete factor file"),
        ([files[0], folder / "f.safetensors", *out], r"other layers: only in one are \['fc', 'model"),
        ([*files, *out, "--weights", 1], "--weights must be 2 numbers, one for each, found 1"),
        ([*files, *out, "--weights", 1, 0], r"--weights must be positive numbers, found 0\.0"),
        ([*files, "--out", files[0], "--overwrite"], r"a\.safetensors is the source itself, or another file"),
        ([*files, "--out", folder / "f.safetensors"], r"f\.safetensors exists"),
        ([*files, "--out", tmp_path / "c.pt"], r"c\.pt: factors are written to a safetensors file"),
    ):
        with pytest.raises(SystemExit, match=said):
            run("merge", *args)
    assert not out[1].exists()


def test_other_weights_are_merged_by_force(folder, tmp_path, capsys):
    args = [*arguments(folder, tmp_path, "collect"), "--layers", "mlp", "--checkpoint", folder / "edited"]
    run("collect", *args)
    both = (tmp_path / "o.safetensors", folder / "f.safetensors", "--out", tmp_path / "c.safetensors")
    with pytest.raises(SystemExit, match=r"Layer 'model.*f\.safetensors was collected on other weights than .*o\.safe"):
        run("merge", *both)
    run("merge", *both, "--force")
    assert len(KroneckerFactors.load(tmp_path / "c.safetensors")) == 6


def test_collect_over_two_corpora_is_merge(folder, tmp_path):
    text = tmp_path / "d.txt"
    text.write_text(language.words(language.tokens(4, 16, seed=5).flatten().tolist()))
    model = ("--model", folder / "model", "--layers", "mlp", "--context", 16)
    for name, corpora in (("c", [folder / "c.jsonl"]), ("d", [text])):
        run("collect", *model, "--corpus", *corpora, "--out", tmp_path / f"{name}.safetensors")
    run("collect", *model, "--corpus", folder / "c.jsonl", text, "--weights", 1, 3, "--out", tmp_path / "e.safetensors")
    merged = tmp_path / "f.safetensors"
    run("merge", tmp_path / "c.safetensors", tmp_path / "d.safetensors", "--weights", 1, 3, "--out", merged)
    mixture = KroneckerFactors.load(tmp_path / "e.safetensors")
    assert mixture.digest() == KroneckerFactors.load(merged).digest()
    assert [source["corpus"] for source in mixture.provenance["sources"]] == ["c.jsonl", "d.txt"]
    edited = ("--factors", tmp_path / "e.safetensors", "--out", tmp_path / "edited", "--dry-run")
    run("edit", "--checkpoint", folder / "model", *edited)


def test_wrong_corpora_are_told_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "tiny.txt").write_text("w1")
    args, corpus = arguments(folder, tmp_path, "collect"), folder / "c.jsonl"
    for more, said in (
        (["--corpus", tmp_path / "none.txt"], r"No such file: .*none\.txt \(--corpus\)"),
        (["--corpus", tmp_path / "tiny.txt"], r"tiny\.txt: 1 tokens are less than one window"),
        (["--weights", 2], "--weights would be ignored: there is one --corpus"),
        (["--corpus", corpus, "--weights", 1, 2, 3], "--weights must be 2 numbers, one for each, found 3"),
        (["--corpus", corpus, "--weights", 1, "nan"], "--weights must be positive numbers, found nan"),
    ):
        with pytest.raises(SystemExit, match=said):
            run("collect", *args, *more)
