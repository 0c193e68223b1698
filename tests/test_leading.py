"""Tokens that a tokenizer puts in front of a text: every window and every prompt begins with them."""

import csv
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.cli.parser import main
from lightning_curvature.storage.jsonl import read_jsonl, write_jsonl
from lightning_curvature.text import collecting, corpus, mining, recall, stress
from lightning_curvature.text.leading import leading_tokens
from lightning_curvature.text.lit import PretrainedLM, TextWindows
from lightning_curvature.text.models import load_model, load_tokenizer
from lightning_curvature.text.probes import JsonlProbe
from lightning_curvature.text.progress import Progress, fingerprint
from lightning_curvature.text.sequences import PromptedSequence, read_sequences, write_sequences
from tests import language, models, reference

BOS, INNER = 39, 38
CASES = {
    "gemma3": ("<s> $A", (BOS,)),
    "llama": ("<s> $A <end>", (BOS,)),
    "mistral": ("<s> <i> $A", (BOS, INNER)),
    "olmo2": ("$A", ()),
}
PREFIX, SUFFIX = 6, 5


def texts(rows, length, seed=0):
    """Random words."""
    return torch.randint(1, 38, (rows, length), generator=torch.Generator().manual_seed(seed))


class Saved(SimpleNamespace):
    """A saved model that recites rows after the tokens in front alone, its tokenizer, and files."""


@pytest.fixture(scope="module", params=CASES)
def saved(request, tmp_path_factory):
    template, front = CASES[request.param]
    path, rows = tmp_path_factory.mktemp(request.param), texts(12, PREFIX + SUFFIX)
    seen = torch.cat([torch.tensor([front] * 6, dtype=torch.int64).view(6, -1), rows[:6]], 1)
    net = language.train(language.model(request.param), seen, 120)
    net.save_pretrained(path / "model")
    language.fronted_tokenizer(template).save_pretrained(path / "model")
    write_jsonl(path / "corpus.jsonl", ({"text": language.words(row)} for row in rows.tolist()))
    (path / "long.txt").write_text(language.words(rows.flatten().tolist()))
    write_sequences(path / "plain.jsonl", [prompted(row) for row in rows.tolist()])
    write_sequences(path / "marked.jsonl", [prompted(row, front, len(front)) for row in rows.tolist()])
    write_sequences(path / "by_hand.jsonl", [prompted(row, front) for row in rows.tolist()])
    return Saved(
        family=request.param,
        path=path,
        model=path / "model",
        front=front,
        rows=rows,
        net=load_model(path / "model"),
        tokenizer=load_tokenizer(path / "model"),
    )


def prompted(row, front=(), marked=0):
    return PromptedSequence((*front, *row[:PREFIX]), tuple(row[PREFIX:]), num_leading=marked)


def cut(saved, length):
    """Windows of the plain text by hand: the tokens in front, and then the text."""
    own = length - len(saved.front)
    ids = saved.rows.flatten().tolist()
    return torch.tensor([[*saved.front, *ids[i : i + own]] for i in range(0, len(ids) - own + 1, own)])


def scored(saved, net, windows):
    """Logits and targets of the text's own tokens, the first one behind a token in front among them."""
    first = max(len(saved.front), 1)
    with torch.no_grad():
        return net(input_ids=windows).logits[:, first - 1 : -1], windows[:, first:]


def perplexity(saved, net, windows):
    logits, target = scored(saved, net, windows)
    return float(F.cross_entropy(logits.flatten(0, 1).double(), target.flatten()).exp())


def greedy(net, prompt, length):
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def run(capsys, *args):
    main([*map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)


# What a tokenizer puts in front --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("$A", ()),
        ("<s> $A", (BOS,)),
        ("<s> $A <end>", (BOS,)),
        ("$A <end>", ()),
        ("<s> <i> $A", (BOS, INNER)),
        ("<end> $A", (0,)),
        ("<end> $A <end>", (0,)),
        ("<s> <s> $A <s>", (BOS, BOS)),
    ],
)
def test_it_is_asked_of_the_tokenizer(template, expected):
    assert leading_tokens(language.fronted_tokenizer(template)) == expected


def test_it_is_told_from_what_an_unknown_word_is():
    """Here <s> also stands for every word that the vocabulary lacks, and all of the first texts are such words."""
    tokenizer = language.fronted_tokenizer("<s> $A <s>")
    tokenizer.backend_tokenizer.model.unk_token = "<s>"
    assert leading_tokens(tokenizer) == (BOS,)


def test_a_bos_token_that_is_not_put_in_front_is_not_one():
    tokenizer = language.fronted_tokenizer("$A")
    assert tokenizer.bos_token_id == BOS
    assert leading_tokens(tokenizer) == ()


@pytest.mark.parametrize(
    "around",
    [
        lambda ids: [BOS, *ids] if len(ids) > 1 else ids,  # depends on the text
        lambda ids: [BOS, *ids[::-1]],
    ],  # changes it
)
def test_what_differs_from_text_to_text_is_refused(around):
    plain = language.fronted_tokenizer("$A")

    class Changing:
        all_special_ids = plain.all_special_ids

        def __len__(self):
            return len(plain)

        def decode(self, ids):
            return plain.decode(ids)

        def __call__(self, text, add_special_tokens, **_):
            ids = plain(text.replace("3", "w3").replace("quick", "w7"))["input_ids"]
            return {"input_ids": around(ids) if add_special_tokens else ids}

    with pytest.raises(ValueError, match=r"What this Changing puts in front of a text cannot be told: it makes .*'a'"):
        leading_tokens(Changing())


# Windows and what is measured on them --------------------------------------------------------------------------------


def test_windows(saved):
    for length in (8, 11):
        found = list(corpus.token_windows(saved.path / "long.txt", saved.tokenizer, length))
        assert found == cut(saved, length).tolist()
        assert all(len(window) == length for window in found)
    limited = list(corpus.token_windows(saved.path / "long.txt", saved.tokenizer, 8, limit=17))
    assert limited == cut(saved, 8)[:2].tolist()
    documents = itertools.chain.from_iterable([*row, 0] for row in saved.rows.tolist())  # closed, and packed
    own = 8 - len(saved.front)
    packed = list(corpus.token_windows(saved.path / "corpus.jsonl", saved.tokenizer, 8))
    assert packed[:3] == [[*saved.front, *itertools.islice(documents, own)] for _ in range(3)]
    if saved.front:
        with pytest.raises(ValueError, match=rf"no room for text: this tokenizer puts {len(saved.front)} in front"):
            next(corpus.token_windows(saved.path / "long.txt", saved.tokenizer, len(saved.front)))
        with pytest.raises(ValueError, match=rf"less than one window of 200, {len(saved.front)} of them in front"):
            next(corpus.token_windows(saved.path / "long.txt", saved.tokenizer, 200))


@pytest.mark.parametrize("file", ["plain", "marked", "by_hand"])
def test_evaluate(saved, capsys, tmp_path, file):
    net, front = saved.net, saved.front
    found = run(
        capsys,
        "evaluate",
        "--model",
        saved.model,
        "--sequences",
        saved.path / f"{file}.jsonl",
        "--corpus",
        saved.path / "long.txt",
        "--context",
        "10",
    )["model"]
    assert found["perplexity"] == pytest.approx(perplexity(saved, net, cut(saved, 10)), rel=1e-5)
    recited = [greedy(net, [*front, *row[:PREFIX]], SUFFIX) == row[PREFIX:] for row in saved.rows.tolist()]
    assert 0.4 < sum(recited) / 12 < 0.6
    assert found["strict"] == pytest.approx(sum(recited) / 12)


def test_evaluate_an_edit_with_prompts_that_move(saved, capsys, tmp_path):
    """The tokens in front stay in front; the ranking of next tokens compares scored positions alone."""
    other = language.model(saved.family, seed=5)
    torch.save({"state_dict": other.state_dict()}, tmp_path / "other.ckpt")
    found = run(
        capsys,
        "evaluate",
        "--model",
        saved.model,
        "--checkpoint",
        tmp_path / "other.ckpt",
        "--reference",
        "--sequences",
        saved.path / "by_hand.jsonl",
        "--corpus",
        saved.path / "long.txt",
        "--context",
        "10",
        "--stress",
        "--examples",
        tmp_path / "x.md",
    )
    windows = cut(saved, 10)
    assert found["after"]["perplexity"] == pytest.approx(perplexity(saved, other, windows), rel=1e-5)
    filler = windows[0, len(saved.front) :].tolist()
    for shift in (-4, 4):
        recited = []
        for row in saved.rows.tolist():
            prompt = filler[-4:] + row[:PREFIX] if shift < 0 else row[4 : PREFIX + 4]
            rest = row[PREFIX + max(shift, 0) :]
            recited.append(greedy(saved.net, [*saved.front, *prompt], len(rest)) == rest)
        assert found["before"][f"strict_shift_{shift:+d}"] == pytest.approx(sum(recited) / 12)
    page = (tmp_path / "x.md").read_text()
    assert f"### 1. `{'<s> ' * bool(saved.front)}" in page or f"### 1. `{language.words(saved.rows[0, :6])}`" in page
    ordinary = page.partition("## Ordinary text")[2]
    assert (
        f"### 1. `{language.words(windows[0, len(saved.front) : (10 + len(saved.front)) // 2].tolist())}`" in ordinary
    )


def test_collect(saved, tmp_path):
    """Against one backward pass for each window; positions in front count, since the text's loss reaches them."""
    net = load_model(saved.model).double()
    windows, first = cut(saved, 9), max(len(saved.front), 1)
    found = collecting.collect_text(
        net,
        saved.tokenizer,
        saved.path / "long.txt",
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
        assert found[name].num_inputs == count
        torch.testing.assert_close(found[name].A, A)
        torch.testing.assert_close(found[name].G, G, rtol=1e-4, atol=1e-6 * float(G.abs().max()))
    # In the first block attention carries the loss to every position in front; the last one predicts the first word.
    last = windows.shape[0] * (8 - max(len(saved.front) - 1, 0))
    assert found["model.layers.0.mlp.gate_proj"].num_inputs == windows.shape[0] * 8
    assert found["model.layers.1.mlp.down_proj"].num_inputs == last


def test_progress_without_them_is_not_gone_on_with(saved, tmp_path):
    out, options = tmp_path / "f.safetensors", {"context": 9, "layers": "mlp"}
    facts = {"tokens": None, "context": 9, "batch_size": 4, "passes": 1, "layers": "mlp"}
    before = fingerprint(saved.net, saved.tokenizer, saved.path / "long.txt", **facts)
    Progress(out, before, 1).save(0, 0, None)
    if saved.front:
        with pytest.raises(ValueError, match=r"progress of another run: \['leading'\] differ"):
            collecting.collect_text(saved.net, saved.tokenizer, saved.path / "long.txt", out, **options)
    else:  # and where there are none, progress of an older version is
        collecting.collect_text(saved.net, saved.tokenizer, saved.path / "long.txt", out, **options)


def test_the_price_of_an_edit_and_a_sweep(saved, capsys, tmp_path):
    factors = collecting.collect_text(
        saved.net, saved.tokenizer, saved.path / "long.txt", tmp_path / "f.safetensors", context=9, layers="mlp"
    )
    common = ("--factors", tmp_path / "f.safetensors", "--corpus", saved.path / "long.txt", "--context", "10")
    done = run(capsys, "edit", "--checkpoint", saved.model, "--perplexity", "1.5", "--out", tmp_path / "e", *common)
    edited, windows = load_model(tmp_path / "e"), cut(saved, 10)
    for key, part in (("perplexity", windows[::2]), ("held_out", windows[1::2])):
        ratio = perplexity(saved, edited, part) / perplexity(saved, saved.net, part)
        assert done["target"][key] == pytest.approx(ratio, rel=1e-4)
    rows = run(
        capsys,
        "sweep",
        "--model",
        saved.model,
        "--sequences",
        saved.path / "plain.jsonl",
        "--out",
        tmp_path / "s",
        "--energies",
        "0.9",
        *common,
    )["rows"]
    assert rows[0]["perplexity"] == pytest.approx(perplexity(saved, saved.net, windows), rel=1e-5)
    half = [s for s in read_sequences(saved.path / "plain.jsonl") if s.half == "tuning"]
    for row, energy in zip(rows, (1.0, 0.9), strict=True):
        with CurvatureEditor(energy).applied(saved.net, factors):
            said = [greedy(saved.net, saved.front + s.prefix_ids, SUFFIX) == list(s.suffix_ids) for s in half]
        assert row["strict"] == pytest.approx(sum(said) / len(half))


def test_a_step_against_a_list(saved, capsys, tmp_path):
    """Margins of suffixes behind the tokens in front: a file with the mark, and one without, give the same edit."""
    collecting.collect_text(
        saved.net, saved.tokenizer, saved.path / "long.txt", tmp_path / "f.safetensors", context=9, layers="mlp"
    )
    for file in ("plain", "marked"):
        run(
            capsys,
            "edit",
            "--checkpoint",
            saved.model,
            "--factors",
            tmp_path / "f.safetensors",
            "--forget",
            saved.path / f"{file}.jsonl",
            "--strength",
            "0.3",
            "--out",
            tmp_path / file,
        )
    one, two = (load_model(tmp_path / file).state_dict() for file in ("plain", "marked"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("what", ["corpus", "sequences"])
def test_detect(saved, capsys, tmp_path, what):
    factors = collecting.collect_text(
        saved.net, saved.tokenizer, saved.path / "long.txt", tmp_path / "f.safetensors", context=9
    )
    ((name, layer),) = factors.items()
    length = 10 if what == "corpus" else len(saved.front) + PREFIX + SUFFIX
    source = (
        ("--corpus", saved.path / "long.txt", "--context", 10)
        if what == "corpus"
        else ("--sequences", saved.path / "plain.jsonl")
    )
    main(
        [
            "detect",
            "--model",
            str(saved.model),
            "--factors",
            str(tmp_path / "f.safetensors"),
            "--out",
            str(tmp_path / "r.csv"),
            *map(str, source),
        ]
    )
    capsys.readouterr()
    windows = cut(saved, length)
    logits, target = scored(saved, saved.net, windows)
    likely = -F.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
    read = []
    handle = saved.net.get_submodule(name).register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    with torch.no_grad():
        saved.net(input_ids=windows[:, :-1])
    handle.remove()
    basis = torch.linalg.eigh(layer.A.double()).eigenvectors  # ascending
    parts = (read[0][:, len(saved.front) :].double() @ basis).square().sum(1)  # of what the text itself makes it read
    shares = parts[:, : basis.shape[0] // 2].sum(1) / parts.sum(1)
    with (tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        index = int(row["window"])
        assert float(row["likelihood"]) == pytest.approx(float(likely[index]), rel=1e-4)
        assert float(row["score"]) == pytest.approx(float(shares[index]), rel=1e-4)
        assert row["text"] == language.words(windows[index, len(saved.front) :].tolist())


def test_a_data_module_and_its_model(saved, tmp_path):
    data = TextWindows(str(saved.path / "long.txt"), str(saved.model), length=10, batch_size=100)
    windows = cut(saved, 10)
    assert data.windows.tolist() == windows.tolist()
    module = PretrainedLM(str(saved.model))
    trainer = models.trainer(tmp_path, enable_checkpointing=False)
    trainer.validate(module, data, verbose=False)
    logged = float(trainer.callback_metrics["val_loss"])
    assert logged == pytest.approx(torch.tensor(perplexity(saved, saved.net, windows)).log().item(), rel=1e-5)
    with torch.no_grad():
        assert float(module._loss(windows)) == pytest.approx(logged, rel=1e-5)  # what a training step computes
    assert isinstance(data.train_dataloader(), DataLoader)


def test_probes(saved):
    probe = JsonlProbe(saved.path / "corpus.jsonl", tokenizer=saved.tokenizer)
    own = 64 - len(saved.front)
    ids = [token for row in saved.rows.tolist() for token in [*row, 0]]
    windows = torch.tensor([[*saved.front, *ids[i : i + own]] for i in range(0, len(ids) - own + 1, own)])
    found = probe.measure(saved.net)["perplexity"]
    assert found == pytest.approx(perplexity(saved, saved.net, windows), rel=1e-5)
    recited = [greedy(saved.net, [*saved.front, *row[:PREFIX]], SUFFIX) == row[PREFIX:] for row in saved.rows.tolist()]
    for file, tokenizer in (("plain", saved.tokenizer), ("marked", saved.tokenizer), ("marked", None)):
        probe = JsonlProbe(saved.path / f"{file}.jsonl", ["strict"], tokenizer)
        assert probe.measure(saved.net)["strict"] == pytest.approx(sum(recited) / 12)
    anything = JsonlProbe(saved.path / "plain.jsonl", ["strict"], object())  # some module's own attribute
    assert anything.sequences == read_sequences(saved.path / "plain.jsonl")


def test_answers(saved):
    said = recall.answer(saved.net, saved.tokenizer, ["w5 w6", "w7"], 2, 4)
    for text, prompt in zip(said, ([5, 6], [7]), strict=True):
        ids = greedy(saved.net, [*saved.front, *prompt], 4)
        ids = ids[: ids.index(0)] if 0 in ids else ids
        assert text == saved.tokenizer.decode(ids, skip_special_tokens=True)


# Mining, and files of sequences --------------------------------------------------------------------------------------


def test_mine(saved, capsys, tmp_path):
    run(
        capsys,
        "mine",
        "--model",
        saved.model,
        "--corpus",
        saved.path / "corpus.jsonl",
        "--prefix",
        PREFIX,
        "--suffix",
        SUFFIX,
        "--out",
        tmp_path / "m.jsonl",
    )
    records = [record for _, record in read_jsonl(tmp_path / "m.jsonl")]
    expected = [
        row for row in saved.rows.tolist() if greedy(saved.net, [*saved.front, *row[:PREFIX]], SUFFIX) == row[PREFIX:]
    ]
    assert len(expected) >= 5
    assert sorted(record["suffix_ids"] for record in records) == sorted(row[PREFIX:] for row in expected)
    for record in records:
        own = record["prefix_ids"][len(saved.front) :]
        assert record["prefix_ids"] == [*saved.front, *own]
        assert record["prefix_text"] == language.words(own)
        assert record["half"] == PromptedSequence(tuple(own), tuple(record["suffix_ids"])).half
        assert record.get("num_leading") == (len(saved.front) or None)  # other files look as they always did
    assert {s.ids[len(saved.front) :] for s in read_sequences(tmp_path / "m.jsonl", None, saved.front)} == {
        tuple(row) for row in expected
    }


def test_near_duplicates_are_told_by_their_text():
    """What stands in front of all windows makes no two of them more alike."""
    one = PromptedSequence((BOS, INNER, 1, 2), (3, 4), num_leading=2)
    two = PromptedSequence((BOS, INNER, 5, 6), (3, 7), num_leading=2)
    assert mining._distinct([one, two], 0.5) == [one, two]
    assert mining._distinct([one, two], 0.25) == [one]


def test_halves_of_files_stay(saved):
    own = [PromptedSequence(tuple(row[:PREFIX]), tuple(row[PREFIX:])) for row in saved.rows.tolist()]
    for file in ("plain", "marked"):
        for half in ("tuning", "validation"):
            found = read_sequences(saved.path / f"{file}.jsonl", half, saved.front)
            assert [s.ids[len(saved.front) :] for s in found] == [s.ids for s in own if s.half == half]
            assert all(s.half == half and s.prefix_ids[: len(saved.front)] == saved.front for s in found)
    asked = read_sequences(saved.path / "by_hand.jsonl", None, saved.front)
    assert [s.prefix_ids for s in asked] == [(*saved.front, *s.prefix_ids) for s in own]
    # A file without the mark that begins with them all the same: its halves are those that it always had.
    assert [s.half for s in asked] == [PromptedSequence(s.prefix_ids, s.suffix_ids).half for s in asked]


def test_a_file_cut_behind_other_tokens_is_refused(tmp_path):
    write_sequences(tmp_path / "s.jsonl", [PromptedSequence((BOS, 1), (2,), num_leading=1)])
    for leading in ((), (INNER,), (BOS, INNER)):
        with pytest.raises(ValueError, match=r"s\.jsonl, line 1: the prefix begins with \[39\] in front of the text"):
            read_sequences(tmp_path / "s.jsonl", None, leading)
    for wrong in ("1", -1, 3, 1.0, True, None):
        write_jsonl(tmp_path / "t.jsonl", [{"prefix_ids": [BOS, 1], "suffix_ids": [2], "num_leading": wrong}])
        with pytest.raises(ValueError, match=r"line 1: num_leading must be a number of tokens of its prefix"):
            read_sequences(tmp_path / "t.jsonl")


def test_moved_prompts_of_a_marked_sequence():
    one = PromptedSequence((BOS, 1, 2), (3, 4), num_leading=1)
    assert stress.moved(one, -1, [9]).prefix_ids == (BOS, 9, 1, 2)
    assert stress.moved(one, 1).prefix_ids == (BOS, 2, 3)
    assert stress.moved(PromptedSequence((1, 2), (3, 4)), 1, leading=(BOS, INNER)).prefix_ids == (BOS, INNER, 2, 3)


def test_factors_by_the_names_of_a_file_are_loaded(saved, tmp_path):
    """A window of the model's whole context, the tokens in front among them, is not too long."""
    write_jsonl(tmp_path / "c.jsonl", [{"text": language.words(texts(1, 300)[0].tolist())}])
    found = collecting.collect_text(saved.net, saved.tokenizer, tmp_path / "c.jsonl", tmp_path / "f", context=64)
    assert list(KroneckerFactors.load(tmp_path / "f")) == list(found)
