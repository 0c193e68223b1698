"""Every reader of files on ten thousand damaged ones: each gives a valid object, or an error that names the file.

Damage is random and the same in every run: bytes flipped, cut off, taken out, repeated and replaced; and values, keys,
types and shapes changed in headers and records that are whole otherwise.
"""

import io
import itertools
import json
import math
import random
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.factors.files import is_factor_file, load_state
from lightning_curvature.report.inspection import describe, description
from lightning_curvature.search.sweep import KEYS, pareto, read_sweep
from lightning_curvature.storage.hashes import tensor_hash
from lightning_curvature.text import corpus, sequences
from lightning_curvature.text.probes import JsonlProbe
from lightning_curvature.text.recall import read_questions
from tests import language

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers warn of what they find odd

# Damage --------------------------------------------------------------------------------------------------------------

HUGE, DEEP = "@huge@", "@deep@"  # replaced in the text: what json.dumps does not write
MARKS = {HUGE: "9" * 5000, DEEP: "[" * 20_000 + "]" * 20_000}
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    2**64,
    -(2**70),
    10**400,
    0.5,
    -2.5,
    1e300,
    math.nan,
    math.inf,
    "",
    "x",
    "1",
    "fc.A",
    "I32",
    "\ud800",
    "\0",
    "../x",
    "/",
    ".",
    "tensor:",
    "tensor:x",
    "n" * 300,
    "{}",
    "{",
    "null",
    [],
    {},
    [1],
    [-1, 2],
    [None],
    ["x"],
    {"a": 1},
    {"": {}},
    HUGE,
    DEEP,
)
KINDS = (
    "BOOL",
    "U8",
    "I8",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "I16",
    "F16",
    "BF16",
    "I32",
    "F32",
    "U64",
    "F64",
    "C64",
)
BYTES = (
    b"",
    b"\0",
    b"\xff",
    b"\x80",
    b"{",
    b"}",
    b'"',
    b",",
    b"\n",
    b"\r",
    b"\0\0\0\0\0\0\0\x7f",
    b"\xff" * 8,
    b"9" * 30,
)


def damaged_bytes(rng, data):
    """Flip, cut off, take out, repeat or replace."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 2, 4, 8, 40, 400)))
        match rng.randrange(6):
            case 0:
                for place in rng.choices(range(len(data)), k=rng.choice((1, 1, 2, 8))) if data else ():
                    data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[start:]
            case 2:
                del data[start:end]
            case 3:
                data[start:start] = data[start:end] * rng.choice((1, 3))
            case 4:
                data[start:end] = rng.randbytes(end - start)
            case 5:
                data[start:end] = rng.choice(BYTES)
    return bytes(data)


def damaged_tree(rng, tree, values=VALUES):
    """Change one thing: a value, a key, an entry more or less; JSON inside of strings, too."""
    if isinstance(tree, str) and tree.startswith('{"') and rng.random() < 0.95:
        return json.dumps(damaged_tree(rng, json.loads(tree)), separators=(",", ":"))
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return rng.choice(values)
    if isinstance(tree, list):
        place = rng.randrange(len(tree))
        middle = rng.choice(([], [tree[place]] * 2, [damaged_tree(rng, tree[place], values)]))
        return [*tree[:place], *middle, *tree[place + 1 :]]
    key = rng.choice(list(tree))
    match rng.randrange(8):
        case 0:
            return {name: value for name, value in tree.items() if name != key}
        case 1:
            name = rng.choice(("", "x", f"{key}.A", key[:-1], "\ud800", "__metadata__", *tree))
            return {name if old == key else old: value for old, value in tree.items()}
        case 2:
            return {**tree, key: tree[rng.choice(list(tree))]}
        case 3:
            return {**tree, rng.choice(("A", "extra", "", *tree)): rng.choice(values)}
    return {**tree, key: damaged_tree(rng, tree[key], values)}


def dumped(tree):
    text = json.dumps(tree, separators=(",", ":"))
    for quote, (mark, content) in itertools.product(('\\\\"', '"'), MARKS.items()):  # also in JSON inside of a string
        text = text.replace(f"{quote}{mark}{quote}", content)
    return text


def damaged_json(rng, data):
    """One of its values is another one."""
    return dumped(damaged_tree(rng, json.loads(data))).encode()


def damaged_lines(rng, data):
    """One of its lines holds another record."""
    lines = data.decode().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = dumped(damaged_tree(rng, json.loads(lines[place])))
    return "\n".join(lines).encode()


def damaged_cells(rng, data):
    """One of the cells of a table is another one, or there is one more or less."""
    rows = [line.split(",") for line in data.decode().splitlines()]
    for _ in range(rng.choice((1, 1, 3))):
        row = rng.choice(rows)
        place = rng.randrange(len(row))
        cells = (
            "",
            "x",
            "nan",
            "inf",
            "-1",
            "0",
            "2",
            "1e999",
            '"',
            '"a',
            "a\rb",
            "a\0b",
            "é",
            "9" * 200_000,
            row[place],
        )
        row[place : place + 1] = rng.choice(([], [row[place]] * 2, [rng.choice(cells)]))
        if not row:
            row.append("")
    return "\n".join(map(",".join, rows)).encode()


def damaged_header(rng, data):
    """The header of a safetensors file holds something else; its length is right."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    match rng.randrange(4):
        case 0:  # another tensor of as many bytes
            entry = rng.choice(tensors)
            size = math.prod(entry["shape"])
            entry["shape"] = rng.choice(([size], [1, size], [size, 1], [], [*entry["shape"], 1], [2 * size], [0, 3]))
            entry["dtype"] = rng.choice((entry["dtype"], "I32", *KINDS))
        case 1:
            one, two = rng.choices(tensors, k=2)
            one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]
        case _ if "__metadata__" in header and rng.random() < 0.8:
            header["__metadata__"] = damaged_tree(rng, header["__metadata__"])
        case _:
            header = damaged_tree(rng, header)
    text = dumped(header).encode()
    return len(text).to_bytes(8, "little") + text + body


TENSORS = (
    torch.ones(2),
    torch.ones(()),
    torch.ones(0, 0),
    torch.eye(3).int(),
    torch.eye(3).to_sparse(),
    torch.eye(3, device="meta"),
    torch.eye(3) * math.nan,
    torch.ones(1).expand(2**24, 2**24),
    torch.eye(3).cfloat(),
    torch.eye(3).cfloat().conj(),
    b"x",
    (1,),
    {1, 2},
    {1: torch.ones(1)},
    {("a",): 1},
    complex(1),
    torch.float32,
)


def damaged_archive(rng, data):
    """A file of torch.save holds something else, or another pickle."""
    if rng.random() < 0.5:
        content = torch.load(io.BytesIO(data), weights_only=True)
        out = io.BytesIO()
        tree = damaged_tree(rng, dict(content), (*VALUES, *TENSORS, *TENSORS))
        torch.save(tree, out, _use_new_zipfile_serialization=rng.random() < 0.8)
        return out.getvalue()
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return damaged_bytes(rng, data)
    out, place = io.BytesIO(), rng.choice(("/data.pkl", "/data.pkl", "/data.pkl", "/byteorder", "/version", "/data/0"))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, damaged_bytes(rng, content) if name.endswith(place) else content)
    return out.getvalue()


def damaged(rng, data, *structured):
    """Bytes a third of the time, or the structure."""
    return rng.choice((damaged_bytes, *(structured or (damaged_bytes,)) * 2))(rng, data)


def refusal(read, path):
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:  # what else is raised fails the test, and leaves the file behind
        return error


def is_clean(error, path):
    """Tell whether the package itself raised an error, and names the file or the folder it belongs to."""
    named = path.name in str(error) or f"{path.parent}:" in str(error)
    return named and type(error) in (ValueError, FileNotFoundError)


def peak_memory():
    """The most memory that this process ever held, in whatever unit the system has."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Readers --------------------------------------------------------------------------------------------------------------


def some_factors():
    torch.manual_seed(0)
    a, g = torch.randn(9, 3), torch.randn(9, 2)
    A, G = a.T @ a / 9, g.T @ g / 9
    full = {"A_coupled": A, "G_coupled": G, "eigenvalues": torch.ones(2, 3), "margins": torch.ones(2, 3)}
    one, two = LayerFactors(A, G, 9, 9, **full), LayerFactors(G.double(), A.double(), 5, 4, 7, True)
    return KroneckerFactors({"a.fc": one, "b": two}, {"fisher": "sketched", "step": 3})


STATE = {"sums": {"a.fc": {"inputs": torch.ones(3), "count": 2}}, "chosen": ["a.fc"], "random": None, "seed": 2}


def factor_file(folder):
    some_factors().save(folder / "f.safetensors", STATE)
    return folder / "f.safetensors"


def paper_file(folder):
    entry = {"A": torch.eye(3), "G": torch.eye(2), "n_tokens": 7}
    torch.save({"blk3.up": entry, "blk10.gate": entry}, folder / "paper.pt")
    return folder / "paper.pt"


def weights():
    return {
        "a.fc.weight": torch.arange(6.0).view(2, 3),
        "b.weight": torch.arange(6.0).view(2, 3).half(),
        "b.bias": torch.ones(3),
    }


def safetensors_file(folder):
    save_file(weights(), folder / "model.safetensors", {"format": "pt"})
    edited = folder / "edited.safetensors"
    CurvatureEditor(0.5, ["a.fc"]).edit_checkpoint(folder / "model.safetensors", some_factors(), edited)
    return edited


def checkpoint_file(folder):
    content = {"state_dict": weights(), "epoch": 1, "lightning_curvature": {"method": "kfac", "layers": {}}}
    torch.save(content, folder / "model.ckpt")
    return folder / "model.ckpt"


def old_archive(folder):
    torch.save(weights(), folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def sharded(folder):
    """A Hugging Face folder of two shards that was edited; its index."""
    whole, model = weights(), folder / "model"
    model.mkdir()
    shards = {f"model-{i}-of-2.safetensors": names for i, names in ((1, ["a.fc.weight"]), (2, ["b.weight", "b.bias"]))}
    for file, names in shards.items():
        save_file({name: whole[name] for name in names}, model / file)
    where = {name: file for file, names in shards.items() for name in names}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 48}, "weight_map": where})
    )
    CurvatureEditor(0.5, ["a.fc"]).edit_checkpoint(
        model, some_factors(), folder / "out", delta=folder / "d.safetensors"
    )
    return folder / "out" / "model.safetensors.index.json"


def shard(folder):
    return sharded(folder).with_name("model-1-of-2.safetensors")


def note(folder):
    return sharded(folder).with_name("curvature_edit.json")


def configuration(folder):
    language.model("llama").save_pretrained(folder / "model")
    return folder / "model" / "config.json"


def delta_of_a_folder(folder):
    sharded(folder)
    return folder / "d.safetensors"


def delta_of_a_file(folder):
    source = safetensors_file(folder)
    CurvatureEditor(0.3, ["b"]).edit_checkpoint(
        source, some_factors(), folder / "out.safetensors", delta=folder / "d.safetensors"
    )
    return folder / "d.safetensors"


RECORDS = {
    "sequences": [
        {"prefix_ids": [1, 2, i], "suffix_ids": [4, 5], "prefix_text": "w1 w2", "half": "x"} for i in range(4)
    ],
    "questions": [{"prompt": "w1 w2", "answers": ["w3", "w4"], "context": "w5"}] * 4,
    "documents": [{"text": "w1 w2 w3 é w4 w5", "id": i} for i in range(4)],
}


def lines(kind):
    def write(folder):
        path = folder / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS[kind]), "utf-8")
        return path

    return write


def text_file(folder):
    (folder / "text.txt").write_text("w1 w2 w3 é w4 w5\n" * 9, "utf-8")
    return folder / "text.txt"


def sweep_file(folder):
    rows = [
        "edit,energy,of,strict,perplexity",
        "unedited,1.0,9f,0.9,10.0",
        "K-FAC,0.5,ab,0.5,nan",
        "K-FAC,0.9,ab,0.6,12.5",
    ]
    (folder / "sweep.csv").write_text("\n".join(rows) + "\n")
    return folder / "sweep.csv"


# What is read is checked to be valid ---------------------------------------------------------------------------------


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
    found = formats.open_checkpoint(path)
    for name, shape in found.shapes().items():
        assert isinstance(name, str)
        tensor = found.read(name)
        assert tuple(tensor.shape) == shape
        assert found.num_bytes(name) == tensor.nbytes
        assert tensor_hash(tensor)
    assert found.provenance is None or isinstance(found.provenance, dict)
    assert all(isinstance(text, str) for text in found.headers().values())


def read_folder(path):
    read_checkpoint(path.parent)


def read_names(path):
    names = formats.open_checkpoint(path.parent).module_names()
    assert all(isinstance(name, str) for pair in names.items() for name in pair)


def describe_file(path):
    found = describe(path)
    json.dumps(found)
    description(found).encode()


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
            one, two = (formats.open_checkpoint(file) for file in (out, path.parent / target))
            assert all(torch.equal(one.read(name), two.read(name)) for name in two.shapes())
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


READERS = {
    "load": (factor_file, load_factors, 900, damaged_header),
    "open": (factor_file, open_factors, 900, damaged_header),
    "load_state": (factor_file, read_state, 900, damaged_header),
    "is_factor_file": (factor_file, tell_factors, 300, damaged_header),
    "describe factors": (factor_file, describe_file, 300, damaged_header),
    "import": (paper_file, import_factors, 700, damaged_archive),
    "safetensors": (safetensors_file, read_checkpoint, 900, damaged_header),
    "describe safetensors": (safetensors_file, describe_file, 300, damaged_header),
    "archive": (checkpoint_file, read_checkpoint, 800, damaged_archive),
    "old archive": (old_archive, read_checkpoint, 300, damaged_archive),
    "describe archive": (checkpoint_file, describe_file, 300, damaged_archive),
    "index": (sharded, read_folder, 700, damaged_json),
    "shard": (shard, read_folder, 400, damaged_header),
    "note": (note, describe_folder, 300, damaged_json),
    "config": (configuration, read_names, 100, damaged_json),
    "apply to a folder": (delta_of_a_folder, use_delta("model", "out", False), 200, damaged_header),
    "revert a folder": (delta_of_a_folder, use_delta("out", "model", True), 200, damaged_header),
    "revert a file": (delta_of_a_file, use_delta("out.safetensors", "edited.safetensors", True), 300, damaged_header),
    "describe a delta": (delta_of_a_file, describe_file, 300, damaged_header),
    "sequences": (lines("sequences"), sequences_of, 800, damaged_lines),
    "documents": (lines("documents"), tokens_of, 500, damaged_lines),
    "text": (text_file, tokens_of, 300),
    "questions": (lines("questions"), questions_of, 300, damaged_lines),
    "probe": (lines("documents"), probe_of, 300, damaged_lines),
    "sweep": (sweep_file, rows_of, 800, damaged_cells),
}
"""What writes a file, what reads it, how many damaged ones, and how their structure is damaged."""


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused_by_its_name(reader, tmp_path):
    write, read, count, *structured = READERS[reader]
    path, rng = write(tmp_path), random.Random(reader)
    good, there = path.read_bytes(), sorted(tmp_path.rglob("*"))
    read(path)
    refused, before = 0, peak_memory()
    for number in range(count):
        path.write_bytes(damaged(rng, good, *structured))
        error = refusal(read, path)
        assert error is None or is_clean(error, path), f"file {number}: {error!r}"
        assert sorted(tmp_path.rglob("*")) == there
        refused += error is not None
    assert peak_memory() < 1.5 * before
    assert refused > count / 5 or read is tell_factors
    path.write_bytes(good)
    read(path)


def test_a_factor_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    path = factor_file(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for read in (KroneckerFactors.load, KroneckerFactors.open, load_state):
            with pytest.raises(ValueError, match=r"f\.safetensors: not a complete factor file"):
                read(path)
        assert not is_factor_file(path)


# Messages ------------------------------------------------------------------------------------------------------------


def rewrite(path, change):
    """Change the header of a safetensors file in place; JSON in its metadata is read and written again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ((key, text),) = header["__metadata__"].items()
    own = json.loads(text)
    change(header, own)
    header["__metadata__"] = {key: json.dumps(own)}
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


FACTORS = [
    (lambda h, own: own.update(version=3), "has version 3, this package reads those up to 2: update it"),
    (lambda h, own: own["layers"]["b"].update(shares_A_with="z"), "layer 'b' cannot have shares_A_with 'z'"),
    (lambda h, own: own["layers"]["b"].update(A_error=-1), "layer 'b' cannot have A_error -1"),
    (lambda h, own: own.update(layers=[]), "its header has no layers, or no provenance"),
    (lambda h, own: own["layers"]["b"].pop("num_inputs"), "layer 'b' must have num_inputs, num_gradients, num_seen"),
    (lambda h, own: own["layers"]["b"].update(num_seen=-1), "layer 'b' cannot have num_seen -1"),
    (lambda h, own: own["layers"]["b"].update(transposed=1), "layer 'b' cannot have transposed 1"),
    (lambda h, own: own["layers"].update(c={"num_inputs": 1, "num_gradients": 1}), "it lacks the tensor 'c.A'"),
    (lambda h, own: h["b.A"].update(shape=[4]), r"layer 'b': Factor A must be a square floating matrix, found \[4\]"),
    (lambda h, own: h["a.fc.margins"].update(dtype="I32"), r"'a.fc': margins must hold floating numbers, .*int32"),
]
DELTAS = [
    (lambda h, own: own.update(version=2), "delta version 2, this package reads 1. Update it"),
    (lambda h, own: own.pop("tensors"), "d.safetensors is damaged: its header is about other tensors than it holds"),
    (lambda h, own: own.pop("values"), "its header lacks hashes of the original and the edited"),
    (lambda h, own: own.pop("headers"), "its header lacks the headers of the original"),
    (lambda h, own: own.update(headers={"": "{"}), "damaged: its copy of the header of the original is not JSON"),
    (
        lambda h, own: own.update(headers={"": '{"__metadata__": 1}'}),
        "header of the original has metadata that are no strings",
    ),
    (lambda h, own: own.update(edit=1), "what it says of the edit does not say what was edited"),
    (lambda h, own: own.pop("before"), "what it says of earlier edits does not say what was edited"),
    (lambda h, own: h["b.weight"].update(shape=[2, 6]), "is damaged: 'b' does not become the original tensor. Copy"),
]


@pytest.mark.parametrize(("change", "message"), FACTORS)
def test_what_is_wrong_with_a_factor_file_is_said(change, message, tmp_path):
    path = factor_file(tmp_path)
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"f\.safetensors: not a complete factor file \(.*{message}"):
        load_factors(path)


def test_a_state_that_is_no_object_is_refused(tmp_path):
    path = factor_file(tmp_path)
    rewrite(path, lambda h, own: own.update(state=[1]))
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
    rewrite(path, lambda h, own: own.update(edit={"method": "kfac", "layers": {"a.fc": {}}}))
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
        ('{"weight_map": {"a": "."}}', "index.json says that '.' holds weights; it is no file"),
        (json.dumps({"weight_map": {"a": "x" * 300}}), r"can be no file \(OSError"),
        ('{"weight_map": {"a": "\\u0000"}}', r"'\\x00' can be no file \(ValueError"),
        ('{"weight_map": {"a": "gone"}}', "'gone' is named in the index, but there is no such file. Copy model"),
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
