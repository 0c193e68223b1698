"""Readers of files that check what they read."""

import json
import shutil
from pathlib import Path

import torch

from lightning_curvature import KroneckerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.factors.files import is_factor_file, load_state
from lightning_curvature.report.inspection import describe, description
from lightning_curvature.search.sweep import KEYS, pareto, read_sweep
from lightning_curvature.storage.hashes import tensor_hash
from lightning_curvature.text import corpus, sequences
from lightning_curvature.text.probes import JsonlProbe
from lightning_curvature.text.recall import read_questions
from tests.support import language


def check_factors(factors):
    for name, layer in factors.items():
        assert isinstance(name, str)
        for factor in (layer.A, layer.G):
            assert factor.dim() == 2
            assert factor.shape[0] == factor.shape[1] > 0
        assert all(tensor.is_floating_point() for tensor in layer.tensors.values())
        assert all(type(n) is int and 0 <= n < 2**63 for n in (layer.num_inputs, layer.num_gradients, layer.num_seen))
        assert type(layer.transposed) is bool
    json.dumps(factors.provenance)
    assert len(factors.digest()) == 64
    assert set(factors.merge(factors)) == set(factors)
    assert isinstance(repr(factors), str)


def load_factors(path):
    check_factors(KroneckerFactors.load(path))


def open_factors(path):
    factors = KroneckerFactors.open(path)
    check_factors(factors)
    assert "\ud800 none" not in factors


def read_state(path):
    state = load_state(path)
    assert state is None or isinstance(state, dict)


def tell_factors(path):
    assert is_factor_file(path) in (True, False)


def import_factors(path):
    check_factors(KroneckerFactors.load(path, names="layers.{block}.{projection}"))


def read_checkpoint(path):
    checkpoint = formats.open_checkpoint(path)
    for name, shape in checkpoint.shapes().items():
        assert isinstance(name, str)
        tensor = checkpoint.read(name)
        assert tuple(tensor.shape) == shape
        assert checkpoint.num_bytes(name) == tensor.nbytes
        assert tensor_hash(tensor)
    assert checkpoint.edit_facts is None or isinstance(checkpoint.edit_facts, dict)
    assert all(isinstance(text, str) for text in checkpoint.headers().values())


def read_folder(path):
    read_checkpoint(path.parent)


def read_names(path):
    names = formats.open_checkpoint(path.parent).module_names()
    assert all(isinstance(name, str) for pair in names.items() for name in pair)


def describe_file(path):
    facts = describe(path)
    json.dumps(facts)
    description(facts).encode()


def describe_folder(path):
    describe_file(path.parent)


def use_delta(source, target, revert):
    """What a delta makes is what its own hashes say, and nothing is left where it makes nothing."""

    def use(path):
        expected = describe(path.parent / target)
        out = path.parent / f"back{Path(target).suffix}"
        try:
            apply_delta(path.parent / source, path, out, revert=revert)
            assert describe(out)["tensors"] == expected["tensors"]
            checkpoint, original = (formats.open_checkpoint(file) for file in (out, path.parent / target))
            assert all(torch.equal(checkpoint.read(name), original.read(name)) for name in original.shapes())
        finally:
            shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    return use


def sequences_of(path):
    made = sequences.read_sequences(path)
    assert all(type(i) is int and 0 <= i < 2**63 for sequence in made for i in sequence.ids)
    assert all(sequence.prefix_ids and sequence.suffix_ids and sequence.half for sequence in made)
    out = path.with_name("copy.jsonl")
    sequences.write_sequences(out, made)
    assert sequences.read_sequences(out) == made
    out.unlink()


TOKENIZER = language.tokenizer()


def tokens_of(path):
    windows = list(corpus.token_windows(path, TOKENIZER, 2))
    assert windows
    assert torch.tensor(windows).shape[1] == 2


def questions_of(path):
    for question in read_questions(path):
        assert all(isinstance(text, str) for text in (question.prompt, question.context, *question.answers))


def probe_of(path):
    assert JsonlProbe(path, tokenizer=TOKENIZER).metrics


def rows_of(path):
    rows = read_sweep(path)
    assert all(set(KEYS) <= row.keys() == rows[0].keys() for row in rows)
    assert all(isinstance(value, str if key in ("edit", "of") else float) for row in rows for key, value in row.items())
    assert all(0 < row["energy"] <= 1 for row in rows)
    assert pareto(rows, minimize=["energy"]) or not rows
