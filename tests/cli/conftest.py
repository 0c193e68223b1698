"""A saved model with its factors, and files that the commands read or refuse."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature.collect.passes import collect
from lightning_curvature.storage import jsonl
from lightning_curvature.text import sequences
from tests.support import language


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("commands")
    for seed, name in ((0, "model"), (3, "edited")):
        language.model("llama", seed).save_pretrained(path / name)
        language.tokenizer().save_pretrained(path / name)
    rows = language.tokens(16, 16)
    jsonl.write_jsonl(path / "c.jsonl", ({"text": language.words(row)} for row in rows.tolist()))
    sequences.write_sequences(
        path / "s.jsonl", [sequences.PromptedSequence(tuple(row[:8]), tuple(row[8:])) for row in rows.tolist()]
    )
    net = language.model("llama")
    factors = collect(net, [rows], lambda batch: net(input_ids=batch, labels=batch).loss, layers="mlp")
    factors.save(path / "f.safetensors")
    for name in ("c.json", "c.NDJSON", "c.jsonl.gz"):
        shutil.copy(path / "c.jsonl", path / name)
    (path / "empty.jsonl").write_text("")
    (path / "empty.txt").write_text("")
    (path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81" * 40)
    (path / "bad.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    (path / "other.jsonl").write_text('{"prefix": 1}\n')
    (path / "blank.jsonl").write_text(json.dumps({"prompt": " ", "answers": ["w1"]}))
    (path / "far.jsonl").write_text(json.dumps({"prefix_ids": [50], "suffix_ids": [1]}))
    (path / "long.jsonl").write_text(json.dumps({"prefix_ids": [1] * 60, "suffix_ids": [1] * 9}))
    save_file({"x.weight": torch.ones(2, 2)}, path / "w.safetensors")
    (path / "broken.safetensors").write_bytes(b"nothing")
    return path
