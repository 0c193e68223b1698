"""Windows, measures and edits behind the tokens that a tokenizer puts in front."""

import csv
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.cli.parser import main
from lightning_curvature.storage.jsonl import write_jsonl
from lightning_curvature.text import collecting, corpus, recall
from lightning_curvature.text.lit import PretrainedLM, TextWindows
from lightning_curvature.text.models import load_model
from lightning_curvature.text.probes import JsonlProbe
from lightning_curvature.text.progress import Progress, run_key
from lightning_curvature.text.sequences import read_sequences
from tests import reference
from tests.support import language, models
from tests.support.leading import PREFIX, SUFFIX, cut, greedy, perplexity, recites, run, scored, texts


def test_windows(fronted):
    for length in (8, 11):
        windows = list(corpus.token_windows(fronted.path / "long.txt", fronted.tokenizer, length))
        assert windows == cut(fronted, length).tolist()
        assert all(len(window) == length for window in windows)
    limited = list(corpus.token_windows(fronted.path / "long.txt", fronted.tokenizer, 8, limit=17))
    assert limited == cut(fronted, 8)[:2].tolist()
    documents = itertools.chain.from_iterable([*row, 0] for row in fronted.rows.tolist())  # closed, and packed
    num_words = 8 - len(fronted.front)
    packed = list(corpus.token_windows(fronted.path / "corpus.jsonl", fronted.tokenizer, 8))
    assert packed[:3] == [[*fronted.front, *itertools.islice(documents, num_words)] for _ in range(3)]
    if fronted.front:
        with pytest.raises(ValueError, match=rf"no room for text: this tokenizer puts {len(fronted.front)} in front"):
            next(corpus.token_windows(fronted.path / "long.txt", fronted.tokenizer, len(fronted.front)))
        with pytest.raises(ValueError, match=rf"less than one window of 200, {len(fronted.front)} of them in front"):
            next(corpus.token_windows(fronted.path / "long.txt", fronted.tokenizer, 200))


@pytest.mark.parametrize("file", ["plain", "marked", "by_hand"])
def test_evaluate(fronted, capsys, tmp_path, file):
    net, front = fronted.net, fronted.front
    results = run(
        capsys,
        "evaluate",
        "--model",
        fronted.model,
        "--sequences",
        fronted.path / f"{file}.jsonl",
        "--corpus",
        fronted.path / "long.txt",
        "--context",
        "10",
    )["model"]
    assert results["perplexity"] == pytest.approx(perplexity(fronted, net, cut(fronted, 10)), rel=1e-5)
    recited = [greedy(net, [*front, *row[:PREFIX]], SUFFIX) == row[PREFIX:] for row in fronted.rows.tolist()]
    assert 0.4 < sum(recited) / 12 < 0.6
    assert results["strict"] == pytest.approx(sum(recited) / 12)


def test_evaluate_an_edit_with_prompts_that_move(fronted, capsys, tmp_path):
    """The tokens in front stay in front; the ranking of next tokens compares scored positions alone."""
    edited = language.model(fronted.family, seed=5)
    torch.save({"state_dict": edited.state_dict()}, tmp_path / "other.ckpt")
    results = run(
        capsys,
        "evaluate",
        "--model",
        fronted.model,
        "--checkpoint",
        tmp_path / "other.ckpt",
        "--reference",
        "--sequences",
        fronted.path / "by_hand.jsonl",
        "--corpus",
        fronted.path / "long.txt",
        "--context",
        "10",
        "--stress",
        "--examples",
        tmp_path / "x.md",
    )
    windows = cut(fronted, 10)
    assert results["after"]["perplexity"] == pytest.approx(perplexity(fronted, edited, windows), rel=1e-5)
    filler = windows[0, len(fronted.front) :].tolist()
    for shift in (-4, 4):
        recited = []
        for row in fronted.rows.tolist():
            prompt = filler[-4:] + row[:PREFIX] if shift < 0 else row[4 : PREFIX + 4]
            rest = row[PREFIX + max(shift, 0) :]
            recited.append(greedy(fronted.net, [*fronted.front, *prompt], len(rest)) == rest)
        assert results["before"][f"strict_shift_{shift:+d}"] == pytest.approx(sum(recited) / 12)
    page = (tmp_path / "x.md").read_text()
    assert (
        f"### 1. `{'<s> ' * bool(fronted.front)}" in page or f"### 1. `{language.words(fronted.rows[0, :6])}`" in page
    )
    ordinary = page.partition("## Ordinary text")[2]
    assert (
        f"### 1. `{language.words(windows[0, len(fronted.front) : (10 + len(fronted.front)) // 2].tolist())}`"
        in ordinary
    )


def test_collect(fronted, tmp_path):
    """Against one backward pass for each window; positions in front count, since the text's loss reaches them."""
    net = load_model(fronted.model).double()
    windows, first = cut(fronted, 9), max(len(fronted.front), 1)
    factors = collecting.collect_text(
        net,
        fronted.tokenizer,
        fronted.path / "long.txt",
        tmp_path / "f.safetensors",
        context=9,
        layers="mlp",
        fisher="empirical",
        batch_size=5,
    )

    def vectors(logits, index):
        p = logits.detach().softmax(-1)
        v = torch.zeros_like(p)
        v[:, first - 1 : -1] = p[:, first - 1 : -1] - F.one_hot(windows[index, first:], p.shape[-1])
        yield v

    class Logits(torch.nn.Module):
        def forward(self, ids):
            return net(input_ids=ids).logits

    for name in ("model.layers.0.mlp.gate_proj", "model.layers.1.mlp.down_proj"):
        A, G, count = reference.factors(Logits(), net.get_submodule(name), windows, vectors, "contributing")
        assert factors[name].num_inputs == count
        torch.testing.assert_close(factors[name].A, A)
        torch.testing.assert_close(factors[name].G, G, rtol=1e-4, atol=1e-6 * float(G.abs().max()))
    # In the first block attention carries the loss to every position in front; the last one predicts the first word.
    last = windows.shape[0] * (8 - max(len(fronted.front) - 1, 0))
    assert factors["model.layers.0.mlp.gate_proj"].num_inputs == windows.shape[0] * 8
    assert factors["model.layers.1.mlp.down_proj"].num_inputs == last


def test_progress_without_them_is_not_gone_on_with(fronted, tmp_path):
    out, options = tmp_path / "f.safetensors", {"context": 9, "layers": "mlp"}
    facts = {"tokens": None, "context": 9, "batch_size": 4, "passes": 1, "layers": "mlp"}
    before = run_key(fronted.net, fronted.tokenizer, fronted.path / "long.txt", **facts)
    Progress(out, before, 1).save(0, 0, None)
    if fronted.front:
        with pytest.raises(ValueError, match=r"progress of another run: \['leading'\] differ"):
            collecting.collect_text(fronted.net, fronted.tokenizer, fronted.path / "long.txt", out, **options)
    else:  # and where there are none, progress of an older version is
        collecting.collect_text(fronted.net, fronted.tokenizer, fronted.path / "long.txt", out, **options)


@pytest.mark.filterwarnings("ignore:The metric is not monotone", "ignore:Every edit that was tried")
def test_of_several_texts_none_exceeds_the_price(fronted, capsys, tmp_path):
    first, second = fronted.path / "long.txt", tmp_path / "other.txt"
    second.write_text(" ".join(reversed(first.read_text().split())))
    factors = tmp_path / "f.safetensors"
    collecting.collect_text(fronted.net, fronted.tokenizer, first, factors, context=9, layers="mlp")
    start = ("edit", "--checkpoint", fronted.model, "--factors", factors, "--perplexity", "1.3", "--context", "10")
    both = run(capsys, *start, "--corpus", first, second, "--out", tmp_path / "both")["target"]
    assert set(both["corpora"]) == {str(first), str(second)}
    assert max(found["perplexity"] for found in both["corpora"].values()) == pytest.approx(both["perplexity"])
    assert both["perplexity"] <= 1.3
    assert str(second) in both["text"]


def test_the_price_of_an_edit_and_a_sweep(fronted, capsys, tmp_path):
    factors = collecting.collect_text(
        fronted.net, fronted.tokenizer, fronted.path / "long.txt", tmp_path / "f.safetensors", context=9, layers="mlp"
    )
    common = ("--factors", tmp_path / "f.safetensors", "--corpus", fronted.path / "long.txt", "--context", "10")
    done = run(capsys, "edit", "--checkpoint", fronted.model, "--perplexity", "1.5", "--out", tmp_path / "e", *common)
    edited, windows = load_model(tmp_path / "e"), cut(fronted, 10)
    for key, part in (("perplexity", windows[::2]), ("held_out", windows[1::2])):
        ratio = perplexity(fronted, edited, part) / perplexity(fronted, fronted.net, part)
        assert done["target"][key] == pytest.approx(ratio, rel=1e-4)
    rows = run(
        capsys,
        "sweep",
        "--model",
        fronted.model,
        "--sequences",
        fronted.path / "plain.jsonl",
        "--out",
        tmp_path / "s",
        "--energies",
        "0.9",
        *common,
    )["rows"]
    assert rows[0]["perplexity"] == pytest.approx(perplexity(fronted, fronted.net, windows), rel=1e-5)
    half = [s for s in read_sequences(fronted.path / "plain.jsonl") if s.half == "tuning"]
    for row, energy in zip(rows, (1.0, 0.9), strict=True):
        with CurvatureEditor(energy).applied(fronted.net, factors):
            said = [greedy(fronted.net, fronted.front + s.prefix_ids, SUFFIX) == list(s.suffix_ids) for s in half]
        assert row["strict"] == pytest.approx(sum(said) / len(half))


def test_a_step_against_a_list(fronted, capsys, tmp_path):
    """Margins of suffixes behind the tokens in front: a file with the mark, and one without, give the same edit."""
    collecting.collect_text(
        fronted.net, fronted.tokenizer, fronted.path / "long.txt", tmp_path / "f.safetensors", context=9, layers="mlp"
    )
    for file in ("plain", "marked"):
        run(
            capsys,
            "edit",
            "--checkpoint",
            fronted.model,
            "--factors",
            tmp_path / "f.safetensors",
            "--forget",
            fronted.path / f"{file}.jsonl",
            "--strength",
            "0.3",
            "--out",
            tmp_path / file,
        )
    plain, marked = (load_model(tmp_path / file).state_dict() for file in ("plain", "marked"))
    assert all(torch.equal(plain[key], marked[key]) for key in plain)


@pytest.mark.parametrize("what", ["corpus", "sequences"])
def test_detect(fronted, capsys, tmp_path, what):
    factors = collecting.collect_text(
        fronted.net, fronted.tokenizer, fronted.path / "long.txt", tmp_path / "f.safetensors", context=9
    )
    ((name, layer),) = factors.items()
    length = 10 if what == "corpus" else len(fronted.front) + PREFIX + SUFFIX
    source = (
        ("--corpus", fronted.path / "long.txt", "--context", 10)
        if what == "corpus"
        else ("--sequences", fronted.path / "plain.jsonl")
    )
    main(
        [
            "detect",
            "--model",
            str(fronted.model),
            "--factors",
            str(tmp_path / "f.safetensors"),
            "--out",
            str(tmp_path / "r.csv"),
            *map(str, source),
        ]
    )
    capsys.readouterr()
    windows = cut(fronted, length)
    logits, target = scored(fronted, fronted.net, windows)
    likely = -F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
    read = []
    handle = fronted.net.get_submodule(name).register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    with torch.no_grad():
        fronted.net(input_ids=windows[:, :-1])
    handle.remove()
    basis = torch.linalg.eigh(layer.A.double()).eigenvectors  # ascending
    parts = (read[0][:, len(fronted.front) :].double() @ basis).square().sum(1)  # of what the text itself makes it read
    shares = parts[:, : basis.shape[0] // 2].sum(1) / parts.sum(1)
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        index = int(row["window"])
        assert float(row["likelihood"]) == pytest.approx(float(likely[index]), rel=1e-4)
        assert float(row["score"]) == pytest.approx(float(shares[index]), rel=1e-4)
        assert row["text"] == language.words(windows[index, len(fronted.front) :].tolist())


def test_a_data_module_and_its_model(fronted, tmp_path):
    data = TextWindows(str(fronted.path / "long.txt"), str(fronted.model), length=10, batch_size=100)
    windows = cut(fronted, 10)
    assert data.windows.tolist() == windows.tolist()
    module = PretrainedLM(str(fronted.model))
    trainer = models.trainer(tmp_path, enable_checkpointing=False)
    trainer.validate(module, data, verbose=False)
    logged = float(trainer.callback_metrics["val_loss"])
    assert logged == pytest.approx(torch.tensor(perplexity(fronted, fronted.net, windows)).log().item(), rel=1e-5)
    with torch.no_grad():
        assert float(module._loss(windows)) == pytest.approx(logged, rel=1e-5)  # what a training step computes
    assert isinstance(data.train_dataloader(), DataLoader)


def test_probes(fronted):
    probe = JsonlProbe(fronted.path / "corpus.jsonl", tokenizer=fronted.tokenizer)
    num_words = 64 - len(fronted.front)
    ids = [token for row in fronted.rows.tolist() for token in [*row, 0]]
    windows = torch.tensor(
        [[*fronted.front, *ids[i : i + num_words]] for i in range(0, len(ids) - num_words + 1, num_words)]
    )
    measured = probe.measure(fronted.net)["perplexity"]
    assert measured == pytest.approx(perplexity(fronted, fronted.net, windows), rel=1e-5)
    recited = recites(fronted, fronted.net)
    for file, tokenizer in (("plain", fronted.tokenizer), ("marked", fronted.tokenizer), ("marked", None)):
        probe = JsonlProbe(fronted.path / f"{file}.jsonl", ["strict"], tokenizer)
        assert probe.measure(fronted.net)["strict"] == pytest.approx(sum(recited) / 12)
    anything = JsonlProbe(fronted.path / "plain.jsonl", ["strict"], object())  # some module's own attribute
    assert anything.sequences == read_sequences(fronted.path / "plain.jsonl")


def test_answers(fronted):
    said = recall.answer(fronted.net, fronted.tokenizer, ["w5 w6", "w7"], 2, 4)
    for text, prompt in zip(said, ([5, 6], [7]), strict=True):
        ids = greedy(fronted.net, [*fronted.front, *prompt], 4)
        ids = ids[: ids.index(0)] if 0 in ids else ids
        assert text == fronted.tokenizer.decode(ids, skip_special_tokens=True)


def test_factors_by_the_names_of_a_file_are_loaded(fronted, tmp_path):
    """A window of the model's whole context, the tokens in front among them, is not too long."""
    write_jsonl(tmp_path / "c.jsonl", [{"text": language.words(texts(1, 300)[0].tolist())}])
    factors = collecting.collect_text(fronted.net, fronted.tokenizer, tmp_path / "c.jsonl", tmp_path / "f", context=64)
    assert list(KroneckerFactors.load(tmp_path / "f")) == list(factors)
