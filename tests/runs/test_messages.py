"""What is wrong with a file is said, with its name and the remedy."""

import json
import math
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.factors.files import is_factor_file, load_state
from lightning_curvature.report.inspection import describe
from tests.support.files import (
    checkpoint_file,
    configuration,
    delta_of_a_file,
    delta_of_a_folder,
    factor_file,
    sharded,
    weights,
)
from tests.support.readers import import_factors, load_factors, rows_of, sequences_of, tokens_of

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers warn of what they find odd


def rewrite(path, change):
    """Change the header of a safetensors file in place; JSON in its metadata is read and written again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ((key, text),) = header["__metadata__"].items()
    metadata = json.loads(text)
    change(header, metadata)
    header["__metadata__"] = {key: json.dumps(metadata)}
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


FACTORS = [
    (lambda header, metadata: metadata.update(version=3), "has version 3, this package reads those up to 2: update it"),
    (
        lambda header, metadata: metadata["layers"]["b"].update(shares_A_with="z"),
        "layer 'b' cannot have shares_A_with 'z'",
    ),
    (lambda header, metadata: metadata["layers"]["b"].update(A_error=-1), "layer 'b' cannot have A_error -1"),
    (lambda header, metadata: metadata.update(layers=[]), "its header has no layers, or no provenance"),
    (
        lambda header, metadata: metadata["layers"]["b"].pop("num_inputs"),
        "layer 'b' must have num_inputs, num_gradients, num_seen",
    ),
    (lambda header, metadata: metadata["layers"]["b"].update(num_seen=-1), "layer 'b' cannot have num_seen -1"),
    (lambda header, metadata: metadata["layers"]["b"].update(transposed=1), "layer 'b' cannot have transposed 1"),
    (
        lambda header, metadata: metadata["layers"].update(c={"num_inputs": 1, "num_gradients": 1}),
        "it lacks the tensor 'c.A'",
    ),
    (
        lambda header, metadata: header["b.A"].update(shape=[4]),
        r"layer 'b': Factor A must be a square floating matrix, found \[4\]",
    ),
    (
        lambda header, metadata: header["a.fc.margins"].update(dtype="I32"),
        r"'a.fc': margins must hold floating numbers, .*int32",
    ),
]

DELTAS = [
    (
        lambda header, metadata: metadata.update(version=2),
        "the delta has version 2, this package reads version 1. Update",
    ),
    (
        lambda header, metadata: metadata.pop("tensors"),
        "d.safetensors is damaged: its header names other tensors than the file holds",
    ),
    (lambda header, metadata: metadata.pop("values"), "its header lacks hashes of the original and the edited"),
    (lambda header, metadata: metadata.pop("headers"), "its header lacks the headers of the original"),
    (
        lambda header, metadata: metadata.update(headers={"": "{"}),
        "damaged: its copy of the header of the original is not JSON",
    ),
    (
        lambda header, metadata: metadata.update(headers={"": '{"__metadata__": 1}'}),
        "header of the original has metadata that are no strings",
    ),
    (lambda header, metadata: metadata.update(edit=1), "its header entry 'edit' does not say what was edited"),
    (lambda header, metadata: metadata.pop("before"), "its header entry 'before' does not say what was edited"),
    (
        lambda header, metadata: header["b.weight"].update(shape=[2, 6]),
        "is damaged: 'b' does not become the original tensor. Copy",
    ),
]


@pytest.mark.parametrize(("change", "message"), FACTORS)
def test_what_is_wrong_with_a_factor_file_is_said(change, message, tmp_path):
    path = factor_file(tmp_path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"f\.safetensors: not a complete factor file \(.*{message}"):
        load_factors(path)


def test_a_state_that_is_no_object_is_refused(tmp_path):
    path = factor_file(tmp_path)
    rewrite(path, lambda header, metadata: metadata.update(state=[1]))
    assert len(KroneckerFactors.load(path)) == 2
    with pytest.raises(ValueError, match=r"f.safetensors: not a complete factor file \(its state is a list"):
        load_state(path)


@pytest.mark.parametrize(("change", "message"), DELTAS)
def test_what_is_wrong_with_a_delta_is_said(change, message, tmp_path):
    path = delta_of_a_file(tmp_path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=message):
        apply_delta(tmp_path / "out.safetensors", path, tmp_path / "back", revert=True)
    assert not (tmp_path / "back").exists()


def test_a_checkpoint_with_other_layers_than_a_delta(tmp_path):
    path = delta_of_a_file(tmp_path)
    save_file({"c.weight": torch.ones(2, 3)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"c.safetensors has other tensors than the checkpoint that .*d.safetensors"):
        apply_delta(tmp_path / "c.safetensors", path, tmp_path / "back", revert=True)


def test_an_edit_that_says_little_of_itself_still_gets_its_section_in_the_card(tmp_path):
    path = delta_of_a_folder(tmp_path)
    rewrite(path, lambda header, metadata: metadata.update(edit={"method": "kfac", "layers": {"a.fc": {}}}))
    apply_delta(tmp_path / "model", path, tmp_path / "again", revert=False)
    assert "| a.fc    | not known | not known   |" in (tmp_path / "again" / "README.md").read_text()


def test_factors_that_cannot_be_decomposed_are_named_by_file_and_layer(tmp_path):
    eye = torch.eye(2)
    KroneckerFactors({"fc": LayerFactors(eye * math.nan, eye, 1, 1)}).save(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"nan.safetensors, layer 'fc': Factor A holds NaN"):
        describe(tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"not a complete factor file \(it is a folder\)"):
        KroneckerFactors.load(tmp_path)
    assert not is_factor_file(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.eye(2).to_sparse()}, r"'w' is no plain tensor, but Tensor \[torch.sparse_coo"),
        ({"w": torch.eye(2, device="meta")}, "'w' is no plain tensor"),
        (
            {"w": torch.ones(1).expand(2**20, 2**20)},
            r"'w' has 4398046511104 bytes, more than the file. Is it expanded\? Clone it",
        ),
        ({1: torch.ones(1)}, "a tensor has the name 1; expected text"),
        ({"state_dict": weights(), "lightning_curvature": {"x": torch.ones(1)}}, "holds more than JSON"),
        ({"state_dict": weights(), "lightning_curvature": {"layers": 1}}, "does not say what was edited"),
    ],
)
def test_what_is_wrong_with_an_archive_is_said(content, message, tmp_path):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"a\.ckpt: .*{message}"):
        describe(tmp_path / "a.ckpt")


def test_a_compressed_archive_is_refused(tmp_path):
    """Its tensors would be read from the disk as they lie there."""
    path = checkpoint_file(tmp_path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match=r"b.ckpt: not a file of torch.save, or a broken one .*entries are compressed"):
        describe(tmp_path / "b.ckpt")


def test_nobody_is_advised_to_load_a_broken_archive_unsafely(tmp_path):
    """The message of torch does."""
    (tmp_path / "a.pt").write_bytes(b"\x80\x02\xc8")
    with pytest.raises(
        ValueError, match=r"a.pt: not a .* \(UnpicklingError: Unsupported operand 200\)\. Copy the file"
    ):
        describe(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"A": 1}, "p.pt: 'A' is no plain tensor, but int"),
        ({"A": torch.eye(3).int()}, "p.pt: 'blk3.up': Factor A must be a square floating matrix"),
        ({"n_tokens": math.inf}, "n_tokens of 'blk3.up' must be a number of positions, found <class 'float'>"),
        ({"n_tokens": torch.ones(2)}, "n_tokens of 'blk3.up' must be a number of positions"),
    ],
)
def test_what_is_wrong_with_factors_of_the_papers_code_is_said(entry, message, tmp_path):
    good = {"A": torch.eye(3), "G": torch.eye(2), "n_tokens": torch.tensor(7)}
    torch.save({"blk3.up": good}, tmp_path / "p.pt")
    assert KroneckerFactors.load(tmp_path / "p.pt", names="{block}.{projection}")["3.up"].num_inputs == 7
    torch.save({"blk3.up": good | entry}, tmp_path / "p.pt")
    with pytest.raises(ValueError, match=message):
        import_factors(tmp_path / "p.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"weight_map": []}', "index.json has no weight_map with the file of each tensor. Copy model"),
        ('{"weight_map": {"a": 1}}', "index.json has no weight_map"),
        ('{"weight_map": {"a": "."}}', "index.json says that '.' holds weights, but it is no file"),
        (json.dumps({"weight_map": {"a": "x" * 300}}), r"cannot be a file name \(OSError"),
        ('{"weight_map": {"a": "\\u0000"}}', r"'\\x00' cannot be a file name \(ValueError"),
        (
            '{"weight_map": {"a": "gone"}}',
            "'gone' is named in the index or is a link, but there is no such file. Copy model",
        ),
        ("\udcff", "index.json is not JSON .'utf-8' codec can't decode .* Copy the file again"),
        ("[]", "index.json must be a JSON object, found list"),
    ],
)
def test_what_is_wrong_with_an_index_is_said(content, message, tmp_path):
    index = sharded(tmp_path)
    index.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        describe(index.parent)


def test_configurations_of_no_model(tmp_path):
    path = configuration(tmp_path)
    good, folder = json.loads(path.read_text()), formats.open_checkpoint(path.parent)
    for change, message in (
        ({"num_hidden_layers": 10**9}, "config.json names more layers than there are tensors"),
        ({"hidden_size": 2**70}, r"config.json describes no model that transformers can build \("),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            folder.module_names()
    path.write_text(json.dumps(good | {"architectures": ["AutoConfig"]}))  # is called with a configuration no more
    assert folder.module_names() == {}
    path.unlink()
    assert folder.module_names() == {}


@pytest.mark.parametrize(("dtype", "size"), [("F6_E2M3", 6), ("F8_E8M0", 8)])
def test_a_tensor_of_a_dtype_that_torch_lacks(dtype, size, tmp_path, monkeypatch):
    monkeypatch.delattr(torch, "float8_e8m0fnu", raising=False)  # since torch 2.7
    header = json.dumps({"w": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ValueError, match=r"w.safetensors: 'w' cannot be read .* Save it with another dtype"):
        formats.open_checkpoint(tmp_path / "w.safetensors").read("w")


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        (b'{"text": "w1 \xff"}', tokens_of, r"x.jsonl, line 1: not JSON in UTF-8 \(.*Write it again"),
        (b'{"text": "\\ud800"}', tokens_of, "x.jsonl, line 1: text must be a string"),
        (b'{"prefix_ids": [1], "suffix_ids": [99999999999999999999]}', sequences_of, "must be a list of token ids"),
        (b'{"prefix_ids": [1], "suffix_ids": [2], "suffix_text": "\\ud800"}', sequences_of, "found half characters"),
        (b"edit,energy,size\n", rows_of, "line 1: the columns must be edit, energy, of and different metrics, found"),
        (b"", rows_of, r"the columns must be edit, energy, of and different metrics, found \[\]"),
        (b"edit,energy,of\n\na,1.0\n", rows_of, "x.jsonl, line 3: 2 cells in 3 columns. Take the line out"),
        (b"edit,energy,of,x\na,1.0,b,c\n", rows_of, "line 2: could not convert string to float: 'c'"),
        (b"edit,energy,of\na,nan,b\n", rows_of, r"line 2: energy must be in \(0, 1\]"),
        (b"edit,energy,of\n\xff,1.0,b\n", rows_of, "'utf-8' codec can't decode"),
    ],
)
def test_what_is_wrong_with_lines_is_said(content, read, message, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.jsonl")


def test_text_in_another_encoding(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"w1 w2 \xe9")
    with pytest.raises(ValueError, match=r"x.txt: not UTF-8 \(.*Save the text in that encoding"):
        tokens_of(tmp_path / "x.txt")
