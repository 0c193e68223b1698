"""A language model that recites half of its rows, saved and in memory."""

import pytest
import torch

from lightning_curvature.storage import jsonl
from lightning_curvature.storage.jsonl import write_jsonl
from lightning_curvature.text import sequences
from lightning_curvature.text.models import load_model, load_tokenizer
from lightning_curvature.text.sequences import write_sequences
from tests.support import language
from tests.support.leading import CASES, PREFIX, SUFFIX, Fronted, prompted, texts


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def edited(folder):
    """A Lightning checkpoint of another model of the same shapes."""
    path = folder / "edited.ckpt"
    weights = {f"net.{key}": value for key, value in language.model("llama", seed=3).state_dict().items()}
    torch.save({"state_dict": weights, "epoch": 1}, path)
    return path


@pytest.fixture(scope="session")
def reciter():
    """A model that recites the first eight of sixteen rows."""
    rows = language.tokens(16, 16)
    return language.train(language.model(), rows[:8], 150), rows


@pytest.fixture(scope="session", params=CASES)
def fronted(request, tmp_path_factory):
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
    return Fronted(
        family=request.param,
        path=path,
        model=path / "model",
        front=front,
        rows=rows,
        net=load_model(path / "model"),
        tokenizer=load_tokenizer(path / "model"),
    )
