"""What an edit of a file reads: each layer's factors once, and what is not edited in chunks."""

import builtins
import hashlib
import math
import resource
import sys

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints import safetensors
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.editing import streaming as files
from lightning_curvature.factors.decomposition import TooFewPositionsError
from lightning_curvature.factors.files import FactorFile
from lightning_curvature.report.inspection import describe
from lightning_curvature.storage.hashes import tensor_hash
from tests.support import processes

BIG = 2**27  # bytes of the tensor that is not edited


def some_factors(names=("a.fc", "b.fc", "c.fc")):
    torch.manual_seed(0)
    A = torch.diag(torch.arange(8.0) + 1)
    return KroneckerFactors(
        {name: LayerFactors(A=A, G=torch.diag(torch.rand(6) + 0.1), num_inputs=90, num_gradients=90) for name in names},
        {"fisher": "sketched"},
    )


def small_weights(names=("a.fc", "b.fc", "c.fc")):
    torch.manual_seed(1)
    return {f"{name}.weight": torch.randn(6, 8) for name in names}


@pytest.fixture
def reads(monkeypatch):
    """Names of the layers whose factors were read from a file."""
    done, get = [], FactorFile.__getitem__
    monkeypatch.setattr(FactorFile, "__getitem__", lambda self, name: done.append(name) or get(self, name))
    return done


@pytest.mark.parametrize("layers", [None, ["b.*"]])
def test_factors_are_read_once(reads, tmp_path, layers):
    """To edit and for their digest together; a dry run needs no digest, and reads what it edits."""
    factors, weights = some_factors(), small_weights()
    factors.save(tmp_path / "f.safetensors")
    save_file(weights, tmp_path / "m.safetensors")
    editor, opened = CurvatureEditor(0.8, layers), KroneckerFactors.open(tmp_path / "f.safetensors")
    files.plan_edit(editor, tmp_path / "m.safetensors", opened)
    assert reads == (list(factors) if layers is None else ["b.fc"])
    reads.clear()
    editor.edit_checkpoint(tmp_path / "m.safetensors", opened, tmp_path / "o.safetensors", delta=tmp_path / "d")
    assert sorted(reads) == sorted(factors)
    facts = describe(tmp_path / "o.safetensors")["edit"]
    assert facts["factors"] == factors.digest()
    expected, report = editor.edit_state_dict(weights, factors)
    edited = formats.open_checkpoint(tmp_path / "o.safetensors")
    assert all(torch.equal(edited.read(name), weight) for name, weight in expected.items())
    assert {name: layer["relative_change"] for name, layer in facts["layers"].items()} == {
        name: edit.relative_change for name, edit in report.layers.items()
    }


def big_checkpoint(kind, folder):
    state = {"big.weight": torch.arange(BIG // 4, dtype=torch.float32).view(64, -1), **small_weights()}
    if kind == "safetensors":
        save_file(state, folder / "m.safetensors")
        return folder / "m.safetensors"
    if kind == "folder":
        (folder / "m").mkdir()
        save_file(state, folder / "m" / "model.safetensors")
        return folder / "m"
    torch.save(state, folder / "m.pt")
    return folder / "m.pt"


@pytest.mark.parametrize("kind", ["safetensors", "folder"])
def test_what_is_not_edited_passes_in_chunks(kind, tmp_path, monkeypatch):
    """Counted by the bytes of every read, by name: no tensor but the edited ones is ever read as a whole."""
    path, largest, whole, open_ = big_checkpoint(kind, tmp_path), [0], set(), builtins.open
    mapped = safetensors.SafetensorsFile._mapped
    monkeypatch.setattr(safetensors.SafetensorsFile, "_mapped", lambda f, name: whole.add(name) or mapped(f, name))

    def counting(*args, **options):
        file = open_(*args, **options)
        return Counting(file, largest) if "rb" in args else file

    monkeypatch.setattr("io.open", counting)  # what Path.open calls
    out = tmp_path / ("out" if kind == "folder" else "out.safetensors")
    CurvatureEditor(0.8).edit_checkpoint(path, some_factors(), out, delta=tmp_path / "d.safetensors")
    apply_delta(out, tmp_path / "d.safetensors", out.with_name("back" + out.suffix), revert=True)
    assert whole == set(small_weights())
    assert 0 < largest[0] <= safetensors._CHUNK < BIG // 4


class Counting:
    """A file that notes the largest read."""

    def __init__(self, file, largest):
        self.file, self.largest = file, largest

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def read(self, size=-1):
        content = self.file.read(size)
        self.largest[0] = max(self.largest[0], len(content))
        return content


def edit_within(path, factors, out, room):
    """Edit in a process, and fail if that takes more memory than there is room for."""
    loaded = KroneckerFactors.open(factors)
    CurvatureEditor(0.8).edit_state_dict(small_weights(), loaded)  # what the first edit of a process takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    CurvatureEditor(0.8).edit_checkpoint(path, loaded, out)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < room


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count in other units")
@pytest.mark.parametrize("kind", ["safetensors", "folder"])
def test_memory_does_not_depend_on_what_is_not_edited(kind, tmp_path):
    path = big_checkpoint(kind, tmp_path)
    some_factors().save(tmp_path / "f.safetensors")
    out = tmp_path / ("out" + path.suffix)
    assert processes.exit_code(edit_within, path, tmp_path / "f.safetensors", out, BIG // 2) == 0
    edited, before = formats.open_checkpoint(out), formats.open_checkpoint(path)
    assert edited.hash("big.weight") == before.hash("big.weight")


def test_what_is_not_edited_in_an_archive_stays_on_the_disk(tmp_path, monkeypatch):
    """Its tensors are mapped, hashed and written from there: none but the edited ones is copied."""
    path, copied, clone = big_checkpoint("pt", tmp_path), [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, *args, **kw: copied.append(t.numel()) or clone(t, *args, **kw))
    CurvatureEditor(0.8).edit_checkpoint(path, some_factors(), tmp_path / "out.pt")
    assert max(copied) <= 64
    edited = torch.load(tmp_path / "out.pt", weights_only=True, mmap=True)
    assert torch.equal(edited["big.weight"][1, :3], torch.arange(BIG // 256, BIG // 256 + 3).float())


@pytest.mark.parametrize("dtype", [name for name in safetensors._DTYPES.values() if hasattr(torch, name)])
@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (1, 1025)])
def test_the_hash_of_a_file_is_the_hash_of_its_tensors(dtype, shape, tmp_path, monkeypatch):
    """By the definition: dtype, shape, and SHA-256 of the bytes, whatever the chunks are."""
    monkeypatch.setattr(safetensors, "_CHUNK", 16)
    dtype = getattr(torch, dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = raw.view(dtype).view(shape)
    expected = f"{dtype} {list(shape)} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()}"
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    assert formats.open_checkpoint(tmp_path / "x.safetensors").hash("x") == expected
    assert tensor_hash(tensor) == expected
    if len(shape) > 1:
        assert tensor_hash(tensor.t().contiguous().t()) == expected


# Layers with too few positions ---------------------------------------------------------------------------------------


def refuse(monkeypatch, *names):
    """Factors of some layers rest on too few positions."""
    edit_weight = CurvatureEditor.edit_weight

    def edit(self, name, *args):
        if name in names:
            raise TooFewPositionsError(f"Layer {name!r}: 3 positions.")
        return edit_weight(self, name, *args)

    monkeypatch.setattr(CurvatureEditor, "edit_weight", edit)


def test_a_layer_with_too_few_positions_is_left_as_it_is(tmp_path, monkeypatch):
    refuse(monkeypatch, "b.fc")
    weights, out = small_weights(), tmp_path / "o.safetensors"
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="Not edited: Layer 'b.fc': 3 positions"):
        report = CurvatureEditor(0.8).edit_checkpoint(tmp_path / "m.safetensors", some_factors(), out)
    assert list(report.layers) == ["a.fc", "c.fc"]
    assert report.skipped == {"b.fc": "Layer 'b.fc': 3 positions."}
    facts = describe(out)["edit"]
    assert list(facts["layers"]) == ["a.fc", "c.fc"]
    assert facts["skipped"] == report.skipped
    edited = formats.open_checkpoint(out)
    assert [torch.equal(edited.read(name), weight) for name, weight in weights.items()] == [False, True, False]
    with pytest.warns(UserWarning, match="Not edited"):
        plan = files.plan_edit(CurvatureEditor(0.8), tmp_path / "m.safetensors", some_factors())
    assert plan.report.skipped == report.skipped
    refuse(monkeypatch, "a.fc", "b.fc", "c.fc")
    with pytest.raises(ValueError, match=r"No layer can be edited: Layer 'a.fc': 3 positions"):
        CurvatureEditor(0.8).edit_checkpoint(tmp_path / "m.safetensors", some_factors(), tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


def test_a_delta_that_was_to_be_replaced_comes_back(tmp_path, monkeypatch):
    save_file(small_weights(), tmp_path / "m.safetensors")
    delta = tmp_path / "d.safetensors"
    delta.write_bytes(b"precious")
    monkeypatch.setattr(safetensors.SafetensorsFile, "copy", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        CurvatureEditor(0.8).edit_checkpoint(
            tmp_path / "m.safetensors", some_factors(), tmp_path / "o.safetensors", delta=delta, overwrite=True
        )
    assert delta.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "d.safetensors"}
