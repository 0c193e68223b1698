"""Saved language models: loading, collecting with resume, memory plans, probes, and the commands on them."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature import KFACEditCallback, KroneckerFactors
from lightning_curvature.cli.parser import main
from lightning_curvature.collect.passes import collect
from lightning_curvature.collect.plan import MemoryPlan
from lightning_curvature.memory import free_memory
from lightning_curvature.storage import jsonl
from lightning_curvature.text import collecting, corpus, sequences
from lightning_curvature.text import models as text_models
from lightning_curvature.text.inner_model import find_language_model
from lightning_curvature.text.probes import JsonlProbe
from lightning_curvature.text.progress import Progress, fingerprint
from tests import language, models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that recites the first eight of sixteen rows, its tokenizer, and files to measure it on."""
    path = tmp_path_factory.mktemp("saved")
    rows = language.tokens(16, 16)
    net = language.train(language.model("llama"), rows[:8], 150)
    net.save_pretrained(path / "model")
    language.tokenizer().save_pretrained(path / "model")
    jsonl.write_jsonl(path / "corpus.jsonl", ({"text": language.words(row)} for row in rows.tolist()))
    jsonl.write_jsonl(
        path / "recall.jsonl", [{"prompt": language.words(rows[0, :8].tolist()), "answers": ["w1", "w2"]}]
    )
    sequences.write_sequences(
        path / "sequences.jsonl",
        [sequences.PromptedSequence(tuple(row[:8]), tuple(row[8:])) for row in rows.tolist()],
    )
    return path


@pytest.fixture(scope="module")
def edited(folder):
    """A Lightning checkpoint of another model of the same shapes."""
    path = folder / "edited.ckpt"
    weights = {f"net.{key}": value for key, value in language.model("llama", seed=3).state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1}, path)
    return path


# Loading -------------------------------------------------------------------------------------------------------------


def test_weights_of_every_kind_of_checkpoint(folder, edited, tmp_path):
    other = language.model("llama", seed=3)
    state = other.state_dict()
    save_file(
        {key: value.clone() for key, value in state.items() if key != "lm_head.weight"}, tmp_path / "a.safetensors"
    )
    torch.save(state, tmp_path / "a.pt")
    for path in (edited, tmp_path / "a.safetensors", tmp_path / "a.pt"):
        loaded = text_models.load_model(folder / "model", path)
        assert not loaded.training
        assert all(torch.equal(value.cpu(), state[key]) for key, value in loaded.state_dict().items())


def other_state():
    return language.model("llama", seed=3).state_dict()


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_of_tied_weights_a_file_may_hold_either_one(folder, tmp_path, kept):
    state = other_state()
    dropped = ({"lm_head.weight", "model.embed_tokens.weight"} - {kept}).pop()
    save_file({key: value.clone() for key, value in state.items() if key != dropped}, tmp_path / "a.safetensors")
    loaded = text_models.load_model(folder / "model", tmp_path / "a.safetensors")
    assert all(torch.equal(value.cpu(), state[key]) for key, value in loaded.state_dict().items())


def test_of_several_models_the_edited_one_is_probed():
    module = torch.nn.Module()
    module.reference, module.policy = language.model(), language.model("gpt2")
    assert find_language_model(module, ["policy.transformer.h.1.mlp.c_proj"]) is module.policy
    with pytest.raises(ValueError, match="holds several language models, 'reference', 'policy'; only one"):
        find_language_model(module)
    assert find_language_model(module.policy) is module.policy


def test_what_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="none is no folder; expected one written by save_pretrained"):
        text_models.load_model(tmp_path / "none")
    torch.save({"state_dict": {"x": torch.ones(1)}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="holds no weights of a LlamaForCausalLM: none of its names ends with"):
        text_models.load_model(folder / "model", tmp_path / "x.ckpt")
    state = language.model("llama").state_dict()
    del state["model.norm.weight"]
    torch.save(state | {"model.extra": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"missing 'model.norm.weight', unexpected 'model.extra'"):
        text_models.load_model(folder / "model", tmp_path / "x.pt")
    state = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in other_state().items()}
    torch.save(state, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"holds several models that fit, under 'student.', 'teacher.'. Save the one"):
        text_models.load_model(folder / "model", tmp_path / "two.pt")
    torch.save({"state_dict": other_state(), "path": tmp_path}, tmp_path / "path.ckpt")
    with pytest.raises(ValueError, match=r"path.ckpt holds objects of pathlib.*, and unpickling"):
        text_models.load_model(folder / "model", tmp_path / "path.ckpt")
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; expected a folder written by"):
        text_models.load_model(folder / "model", tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"is no file; a checkpoint is a \.ckpt, .pt or .safetensors file, or a"
    ):
        text_models.load_model(folder / "model", tmp_path / "none.ckpt")
    torch.save([1], tmp_path / "y.pt")
    with pytest.raises(ValueError, match="holds no weights"):
        text_models.load_model(folder / "model", tmp_path / "y.pt")
    with pytest.raises(
        ValueError, match=r"The tokenizer has 50 tokens, the model's vocabulary 40: it belongs to another"
    ):
        text_models.check_vocabulary(language.model(), language.tokenizer(50))
    with pytest.raises(ValueError, match="Linear holds no transformers model that can generate"):
        find_language_model(torch.nn.Linear(1, 1))


# Collecting ----------------------------------------------------------------------------------------------------------

OPTIONS = {"layers": "mlp", "context": 8, "batch_size": 3, "save_every": 2}


def same(one, two):
    assert list(one) == list(two)
    for name, layer in one.items():
        assert torch.equal(layer.A, two[name].A)
        assert torch.equal(layer.G, two[name].G)
        assert layer.num_inputs == two[name].num_inputs
        assert layer.num_seen == two[name].num_seen


def collected(folder, out, **options):
    model, tokenizer = text_models.load_model(folder / "model"), text_models.load_tokenizer(folder / "model")
    return collecting.collect_text(model, tokenizer, folder / "corpus.jsonl", out, **OPTIONS | options)


def test_a_saved_model_over_a_file(folder, tmp_path):
    found = collected(folder, tmp_path / "f.safetensors")
    net, tokenizer = text_models.load_model(folder / "model"), text_models.load_tokenizer(folder / "model")
    rows = torch.tensor(list(corpus.token_windows(folder / "corpus.jsonl", tokenizer, 8)))
    step = lambda batch: net(input_ids=batch, labels=batch).loss  # noqa: E731
    expected = collect(net, torch.split(rows, 3), step, layers="mlp")
    same(found, expected)
    same(found, KroneckerFactors.load(tmp_path / "f.safetensors"))
    assert found.provenance["corpus"] == "corpus.jsonl"
    assert found.provenance["tokens"] == rows.numel()
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    limited = collected(folder, tmp_path / "g.safetensors", tokens=50)
    assert next(iter(limited.values())).num_seen == 48
    same(collected(folder, tmp_path / "h.safetensors", accumulate_on="cpu"), found)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("stop", [1, 3, 6, 9, 17])
def test_an_interrupted_collection_goes_on_where_it_was(folder, tmp_path, monkeypatch, passes, stop):
    whole = collected(folder, tmp_path / "whole.safetensors")
    step, steps = collecting._step, []

    def interrupted(*args):
        steps.append(1)
        if len(steps) == stop:
            raise KeyboardInterrupt
        step(*args)

    monkeypatch.setattr(collecting, "_step", interrupted)
    out = tmp_path / "f.safetensors"
    total = 12 * passes
    if stop <= total:
        with pytest.raises(KeyboardInterrupt):
            collected(folder, out, passes=passes)
        assert not out.exists()
    found = collected(folder, out, passes=passes)
    same(found, whole)
    assert len(steps) <= total + 2  # at most one step since the last save was done again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.safetensors", "whole.safetensors"]


def test_progress_of_another_run_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(collecting, "tqdm", pytest.fail)
    out = tmp_path / "f.safetensors"
    tokenizer = text_models.load_tokenizer(folder / "model")

    def run(net, **options):
        collecting.collect_text(net, tokenizer, folder / "corpus.jsonl", out, **OPTIONS | options)

    net = text_models.load_model(folder / "model")
    facts = {"tokens": None, "context": 8, "batch_size": 3, "passes": 1, "layers": "mlp"}
    run_id = fingerprint(net, tokenizer, folder / "corpus.jsonl", **facts)
    Progress(out, run_id, 1).save(0, 2, None)
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


# Memory --------------------------------------------------------------------------------------------------------------


def test_the_plan_adds_up(caplog):
    plan = MemoryPlan({"a": (3, 4), "b": (100, 2000)}, torch.device("cpu"))
    blocks = 512 * (512 + 1024 + 1536) + 464 * 2000  # rows up to the diagonal
    assert plan.num_bytes == 12 * (9 + 16 + 100**2) + 4 * 2000**2 + 8 * blocks
    assert "\n  a  3 x 4  0.3 KiB\n  b  100 x 2000  34.45 MiB\n" in str(plan)
    plan.check(plan.num_bytes)
    with pytest.raises(RuntimeError, match=r"cpu has .* left: that does not fit. Choose fewer layers \(layers=\), or"):
        plan.check(plan.num_bytes - 1)
    cuda = MemoryPlan({"a": (3, 4)}, torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"accumulate on the CPU \(accumulate_on='cpu'\), or collect .* --passes"):
        cuda.check(10)
    assert free_memory(torch.device("cpu")) > 2**20


def test_memory_is_told_and_checked_before_anything_is_summed(caplog, monkeypatch):
    net, rows = language.model(), language.tokens(4, 8)
    step = lambda batch: net(input_ids=batch, labels=batch).loss  # noqa: E731
    with caplog.at_level("INFO"):
        collect(net, [rows], step, layers="mlp")
    assert "Memory of the K-FAC factors of 6 layers, on cpu" in caplog.text
    monkeypatch.setattr("lightning_curvature.memory.free_memory", lambda device: 1000)
    monkeypatch.setattr("lightning_curvature.collect.collector.LayerSums", pytest.fail)
    with pytest.raises(RuntimeError, match=r"cpu has 1.0 KiB left: that does not fit"):
        collect(net, [rows], step, layers="mlp")


def test_device_memory_is_asked_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    assert free_memory(torch.device("cuda")) == 9  # what the allocator holds but does not use is free, too


# Probes --------------------------------------------------------------------------------------------------------------


def test_probes_of_a_language_model_in_the_callback(folder, tmp_path):
    """Before and after, at each validation, without disturbing training."""
    probes = {
        "recited": str(folder / "sequences.jsonl"),
        "some": {"path": str(folder / "sequences.jsonl"), "metrics": ["strict"]},
        "text": {"path": str(folder / "long.jsonl"), "tokenizer": str(folder / "model")},
        "facts": str(folder / "recall.jsonl"),
    }
    jsonl.write_jsonl(folder / "long.jsonl", [{"text": language.words(language.tokens(1, 300)[0].tolist())}])

    def fit(*callbacks):
        torch.manual_seed(0)
        module = language.LitLM()
        module.tokenizer = language.tokenizer()
        module.net.config.max_position_embeddings = 256
        rows = language.loader(language.tokens(16, 12))
        module.probe_dataloader = lambda: {
            "loader": [
                {"input_ids": language.tokens(2, 6)},
                {"input_ids": language.tokens(2, 6), "attention_mask": torch.tensor([[1] * 4 + [0] * 2, [1] * 6])},
            ]
        }
        models.trainer(tmp_path, *callbacks, enable_checkpointing=False).fit(module, rows, rows)
        return module

    callback = KFACEditCallback(probes=probes)
    module, plain = fit(callback), fit()
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in module.state_dict().items())
    measured = {
        name.removeprefix("curvature/").removesuffix("/before")
        for name in callback.probe_results
        if name.endswith("/before")
    }
    assert measured == {
        "recited/strict",
        "recited/loose",
        "recited/edit_distance",
        "recited/extraction_strength",
        "recited/min_k",
        "some/strict",
        "text/perplexity",
        "facts/recall",
        "loader/perplexity",
    }
    assert set(callback.probe_results) <= set(module.trainer.callback_metrics) | set(callback.probe_results)
    assert "curvature/recited/strict/after" in module.trainer.callback_metrics
    before, after = (callback.probe_results[f"curvature/text/perplexity/{when}"] for when in ("before", "after"))
    assert before != after


def test_bad_probes(folder, tmp_path):
    for probes, error, message in [
        ({"p": str(tmp_path / "none.jsonl")}, FileNotFoundError, "Probe 'p': there is no file .*none.jsonl"),
        ({"p": {"metrics": ["strict"]}}, ValueError, "Probe 'p' has no 'path'"),
        ({"p": {"path": "x", "metric": "strict"}}, ValueError, "An entry of probe 'p' must be one of .*Did you mean"),
    ]:
        trainer = models.trainer(tmp_path, KFACEditCallback(probes=probes))
        with pytest.raises(error, match=message):  # before the first step
            trainer.fit(language.LitLM(), language.loader(language.tokens(8, 8)))
        assert trainer.global_step == 0
    with pytest.raises(ValueError, match=r"metric of .* must be one of .*'strict'.* found 'perplexity'"):
        JsonlProbe(folder / "sequences.jsonl", ["perplexity"])
    with pytest.raises(ValueError, match=r"corpus.jsonl needs a tokenizer"):
        JsonlProbe(folder / "corpus.jsonl")
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match=r"line 1: found the fields \['a'\]; a probe has"):
        JsonlProbe(path)


# Commands ------------------------------------------------------------------------------------------------------------


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
        (["--sequences", folder / "sequences.jsonl", "--reference"], "name the edited checkpoint, too"),
        (["--sequences", folder / "sequences.jsonl", "--examples", tmp_path / "x.md"], "they need --reference"),
        (["--sequences", tmp_path / "none.jsonl"], "No such file"),
        (["--corpus", folder / "corpus.jsonl", "--context", 100], "Windows of 100 tokens are longer than the model's"),
        (["--corpus", folder / "corpus.jsonl", "--context", 4000], "less than one window of 4000"),
    ]:
        with pytest.raises(SystemExit, match=message):
            run(*model, *arguments)
    with pytest.raises(SystemExit, match="none is no folder"):
        run("collect", "--model", tmp_path / "none", "--corpus", folder / "corpus.jsonl", "--out", tmp_path / "f")
