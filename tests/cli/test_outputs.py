"""Paths and options of the commands on files: what does not fit is told in words, before anything is worked out."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.checkpoints import opening as formats
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.checkpoints.empty_model import empty_model
from lightning_curvature.cli.commands.presets import named_layers
from lightning_curvature.cli.parser import main
from lightning_curvature.collect.passes import collect
from lightning_curvature.layers.selection import PRESETS
from lightning_curvature.storage.outputs import check_name, ending
from tests.support import language

EDITOR = CurvatureEditor(0.8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One model in every format, its factors, and a delta."""
    root = tmp_path_factory.mktemp("saved")
    model, rows = language.model("llama"), language.tokens(16, 12)
    step = lambda ids: model(input_ids=ids, labels=ids).loss  # noqa: E731
    collect(model, [rows], step, layers=["mlp", "attention"]).save(root / "factors.safetensors")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, root / "model.pt")
    torch.save({"state_dict": {f"net.{name}": tensor for name, tensor in state.items()}}, root / "model.ckpt")
    save_file(state, root / "model.safetensors")
    model.save_pretrained(root / "folder")
    language.tokenizer().save_pretrained(root / "folder")
    EDITOR.edit_checkpoint(
        root / "model.pt", KroneckerFactors.open(root / "factors.safetensors"), root / "edited.pt", delta=root / "delta"
    )
    (root / "text.txt").write_text("w1 w2 w3")
    return root


@pytest.fixture
def nothing_computed(monkeypatch):
    monkeypatch.setattr(CurvatureEditor, "edit_weight", None)
    monkeypatch.setattr("lightning_curvature.checkpoints.base.Checkpoint.hashes", None)


SOURCES = {"pt": "model.pt", "ckpt": "model.ckpt", "safetensors": "model.safetensors", "folder": "folder"}


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        *(
            (source, out, "a file of torch.save is written; name it NAME.ckpt or NAME.pt")
            for source in ("pt", "ckpt")
            for out in ("x.safetensors", "x.SafeTensors", "x.ckpt.safetensors", ".safetensors", "x.json", "x.gguf")
        ),
        *(
            ("safetensors", out, "a safetensors file is written; name it NAME.safetensors")
            for out in ("x.pt", "x.ckpt", "x.PT", "x.safetensors.bin", "pytorch_model.bin", "x.pth.tar", "x.json")
        ),
        *(
            ("folder", out, "a Hugging Face folder is written; name a folder")
            for out in ("x.safetensors", "x.ckpt", "x.Pt", "model.bin", "x.gguf")
        ),
    ],
)
def test_a_name_of_another_format_is_refused(saved, tmp_path, nothing_computed, source, out, message):
    factors = KroneckerFactors.open(saved / "factors.safetensors")
    with pytest.raises(ValueError, match=f"{out}: the format follows the source, and {message}"):
        EDITOR.edit_checkpoint(saved / SOURCES[source], factors, tmp_path / out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("pt", "x.bin"),
        ("pt", "pytorch_model.PTH"),
        ("ckpt", "x.pth.tar"),
        ("pt", "last"),
        ("ckpt", "x.safetensors.pt"),
        ("safetensors", "x.SAFETENSORS"),
        ("safetensors", "x.pt.safetensors"),
        ("safetensors", "x"),
        ("safetensors", "v1.5"),
        ("folder", "x"),
        ("folder", "llama-3.2"),
        ("folder", "x.v1"),
    ],
)
def test_what_is_written_can_be_read(saved, tmp_path, source, out, capsys):
    """By ``inspect``, whatever the name."""
    factors = KroneckerFactors.open(saved / "factors.safetensors")
    EDITOR.edit_checkpoint(saved / SOURCES[source], factors, tmp_path / out)
    main(["inspect", str(tmp_path / out)])
    assert "; edited:" in capsys.readouterr().out
    assert formats.open_checkpoint(tmp_path / out).format == formats.open_checkpoint(saved / SOURCES[source]).format


def test_a_wrong_pattern_is_told_before_anything_is_read(saved, tmp_path, nothing_computed):
    factors = KroneckerFactors.open(saved / "factors.safetensors")
    with pytest.raises(ValueError, match=r"Pattern 'x\*' matches no layer of the factors"):
        CurvatureEditor(0.8, ["x*"]).edit_checkpoint(saved / "model.pt", factors, tmp_path / "o.pt")
    eye = torch.eye(2)
    foreign = KroneckerFactors({"other.fc": LayerFactors(A=eye, G=eye, num_inputs=9, num_gradients=9)})
    with pytest.raises(ValueError, match="1 of 1 layers of the factors have no weight in the checkpoint"):
        EDITOR.edit_checkpoint(saved / "model.pt", foreign, tmp_path / "o.pt")
    assert not list(tmp_path.iterdir())


def test_other_files_have_names_of_their_format(saved, tmp_path, nothing_computed):
    factors = KroneckerFactors.open(saved / "factors.safetensors")
    for name in ("d.pt", "d.ckpt", "d.BIN", "d.json"):
        with pytest.raises(ValueError, match=f"{name}: a delta is a safetensors file; name it NAME.safetensors"):
            EDITOR.edit_checkpoint(saved / "model.pt", factors, tmp_path / "o.pt", delta=tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: a factor file is a safetensors file; name it NAME.safetensors"):
            factors.save(tmp_path / name)
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="there is a folder; a factor file is one file"):
        factors.save(tmp_path / "there")
    with pytest.raises(ValueError, match=r"o.pt: the format follows the source, and a Hugging Face folder is written"):
        EDITOR.edit_checkpoint(saved / "model.ckpt", factors, tmp_path / "o.pt", to_hf=saved / "folder")
    with pytest.raises(ValueError, match=r"x.safetensors: the format follows the source, and a file of torch.save"):
        apply_delta(saved / "edited.pt", saved / "delta", tmp_path / "x.safetensors", revert=True)
    with pytest.raises(FileExistsError, match=r"there is a folder, and a file of torch.save is written"):
        EDITOR.edit_checkpoint(saved / "model.pt", factors, tmp_path / "there", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="file is a file, and a Hugging Face folder is written"):
        EDITOR.edit_checkpoint(saved / "folder", factors, tmp_path / "file", overwrite=True)
    with pytest.raises(FileExistsError, match=r"cannot be written: .*file is a file, not a folder"):
        EDITOR.edit_checkpoint(saved / "model.pt", factors, tmp_path / "file" / "o.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"there", "file"}


def test_files_under_the_name_of_another_format_are_told(saved, tmp_path):
    shutil.copy(saved / "model.pt", tmp_path / "a.safetensors")
    shutil.copy(saved / "model.safetensors", tmp_path / "b.pt")
    for name, message in (
        ("a.safetensors", "It is one of torch.save: name it NAME.pt"),
        ("b.pt", "It is a safetensors file: name it NAME.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            formats.open_checkpoint(tmp_path / name)
    assert ending("a.b/c") == ""
    with pytest.raises(ValueError, match="a folder"):
        check_name("x.onnx", "folder")


# Options --------------------------------------------------------------------------------------------------------------


def run(*args):
    main([str(arg) for arg in args])


def command(saved, tmp_path, *more, checkpoint="folder", factors="factors.safetensors", out="out"):
    return ("edit", "--checkpoint", saved / checkpoint, "--factors", saved / factors, "--out", tmp_path / out, *more)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--half", "tuning"], "--half is used by --forget alone, which is not given"),
        (["--strength", 0.4], "--strength is used by --forget alone"),
        (["--model", "model.pt"], "folder is a folder with a model of its own: leave --model out"),
        (["--context", 128], "--context is used by --perplexity alone"),
        (["--tokens", 50000], "--tokens is used by --perplexity alone"),
        (["--corpus", "text.txt"], "--corpus is used by --perplexity alone"),
        (["--forget", "text.txt", "--corpus", "text.txt"], "--corpus is used by --perplexity alone"),
        (["--perplexity", 1.1, "--corpus", "text.txt", "--half", "tuning"], "--half is used by --forget alone"),
        (["--perplexity", 1.1, "--corpus", "text.txt", "--energy", 0.8], "--perplexity finds the energy"),
        (["--perplexity", 1.1], "needs a text to measure it on: --corpus"),
        (["--perplexity", 1.1, "--corpus", "nothing.txt"], "--corpus: .*nothing.txt is no file"),
        (["--forget", "folder"], "--forget: .*folder is no file"),
        (["--dry-run", "--save-delta", "d.safetensors"], "--dry-run writes nothing: leave --save-delta out"),
        (["--bases", "out/bases"], "lie one inside the other"),
        (["--save-delta", "out/d.safetensors"], "lies inside of a folder that is written as a whole"),
        (["--to-hf", "folder"], r"is no file of torch.save \(.ckpt, .pt\): only those become a folder"),
        (["--allow-global", "argparse.Namespace"], "--allow-global is for files of torch.save"),
        (["--bases", "text.txt"], "--bases .*text.txt is a file; it names a folder"),
        (["--bases", "folder"], "--bases .*folder is or lies in .*folder, which is read"),
        (["--bases", "folder/bases"], "--bases .*bases is or lies in .*folder, which is read"),
        (["--bases", "folder", "--dry-run"], "--bases .*folder is or lies in .*folder, which is read"),
    ],
)
def test_options_that_would_be_ignored_are_errors(saved, tmp_path, nothing_computed, options, message):
    files = {"folder", "folder/bases", "text.txt", "nothing.txt", "model.pt"}
    given = [saved / option if option in files else option for option in options]
    given = [
        tmp_path / option if str(option) in ("d.safetensors", "out/d.safetensors", "out/bases") else option
        for option in given
    ]
    with pytest.raises(SystemExit, match=message):
        run(*command(saved, tmp_path, *given))
    assert not list(tmp_path.iterdir())


def test_a_dry_run_reads_bases_and_writes_none(saved, tmp_path, monkeypatch, capsys):
    options = ["--bases", tmp_path / "bases", "--dry-run"]
    run(*command(saved, tmp_path, *options))
    assert not list(tmp_path.iterdir())
    run(*command(saved, tmp_path, *options[:-1]))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert any(path.parent.name == "bases" for path in before)
    monkeypatch.setattr("lightning_curvature.factors.basis_cache.decompose", lambda *_: pytest.fail("worked out again"))
    run(*command(saved, tmp_path, *options, "--overwrite"))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to-hf", "folder", "--bases", "folder/b"], "--bases .*b is or lies in .*folder, which is read"),
        (["--model", "folder"], "--model is used by --perplexity and --forget and a preset of --layers alone"),
        (["--layers", "net.*", "--model", "folder"], "--model is used by"),
        (["--perplexity", 1.1, "--corpus", "text.txt", "--model", "model.pt"], "--model: .*model.pt is no folder"),
    ],
)
def test_the_model_of_a_checkpoint(saved, tmp_path, nothing_computed, options, message):
    given = [
        saved / option if option in {"folder", "folder/b", "text.txt", "model.pt"} else option for option in options
    ]
    with pytest.raises(SystemExit, match=message):
        run(*command(saved, tmp_path, *given, checkpoint="model.ckpt", out="o.ckpt"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"factors": "none.safetensors"}, "none.safetensors: no such file. Factors of a model are made by"),
        ({"factors": "folder"}, "it is a folder of a model: it holds weights, not factors"),
        ({"factors": "folder/model.safetensors"}, "it holds weights, not factors; lightning-curvature collect makes"),
        ({"factors": "model.pt"}, "it is a file of torch.save: it holds weights, not factors"),
        ({"factors": "delta"}, "it holds weights, not factors"),
        ({"factors": "text.txt"}, "not a complete factor file"),
        ({"checkpoint": "factors.safetensors"}, "holds K-FAC factors, not weights: edit takes it as --factors"),
        ({"checkpoint": "delta"}, "is a delta, not a checkpoint: revert and apply take it as --delta"),
        ({"checkpoint": "none.pt"}, "none.pt: no such file or folder"),
        ({"checkpoint": "text.txt"}, "not a file of torch.save"),
        ({"checkpoint": "model.ckpt", "more": ["--to-hf", "none"]}, "none has no config.json"),
    ],
)
def test_files_of_another_kind_are_told_apart(saved, tmp_path, nothing_computed, given, message):
    more = [saved / option if option == "none" else option for option in given.pop("more", [])]
    with pytest.raises(SystemExit, match=message) as error:
        run(*command(saved, tmp_path, *more, **given))
    assert "Errno" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ("none", "none: no such file. To write a delta, run edit with --save-delta"),
        ("folder", r"folder is no delta \(it is a folder\)"),
        ("model.pt", r"model.pt is no delta \(it is no safetensors file\)"),
        ("factors.safetensors", "factors.safetensors is no delta. To write a delta, run edit"),
    ],
)
@pytest.mark.parametrize("kind", ["revert", "apply"])
def test_what_is_no_delta(saved, tmp_path, kind, delta, message):
    with pytest.raises(SystemExit, match=message):
        run(kind, "--checkpoint", saved / "edited.pt", "--delta", saved / delta, "--out", tmp_path / "x.pt")
    for source, reason in (
        ("none.pt", "no such file or folder"),
        ("factors.safetensors", "holds K-FAC factors"),
        ("delta", "is a delta, not a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=reason):
            run(kind, "--checkpoint", saved / source, "--delta", saved / "delta", "--out", tmp_path / "x.pt")


# Presets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("last-mlp", ["model.layers.1.mlp.down_proj"]),
        ("mlp", [f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")]),
        ("attention", [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkvo"]),
    ],
)
def test_presets_choose_layers_of_the_factors(saved, tmp_path, capsys, preset, expected):
    run(*command(saved, tmp_path, "--layers", preset, "--json"))
    assert sorted(json.loads(capsys.readouterr().out)["layers"]) == sorted(expected)
    named = command(
        saved,
        tmp_path,
        "--layers",
        preset,
        "--model",
        saved / "folder",
        "--json",
        checkpoint="model.ckpt",
        out="o.ckpt",
    )
    run(*named)
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert sorted(edit["tensor"] for edit in layers.values()) == sorted(f"net.{name}.weight" for name in expected)


def test_presets_where_no_model_can_be_built(saved, tmp_path):
    for checkpoint in ("model.ckpt", "model.safetensors"):
        with pytest.raises(SystemExit, match=r"--layers mlp: presets need a model folder .* Or give patterns"):
            run(*command(saved, tmp_path, "--layers", "mlp", checkpoint=checkpoint, out="o." + checkpoint[6:]))
    shutil.copytree(saved / "folder", tmp_path / "own")
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps(config | {"architectures": ["MyModel"]}))
    assert empty_model(tmp_path / "own") is None
    factors = KroneckerFactors.open(saved / "factors.safetensors")
    with pytest.raises(ValueError, match="presets need a model folder"):
        named_layers(["mlp"], factors, tmp_path / "own")
    attention = {name: layer for name, layer in factors.items() if "attn" in name}
    with pytest.raises(
        ValueError, match=r"--layers mlp: the factors hold none of the layers of this preset, 'model.layers.0.mlp"
    ):
        named_layers(["mlp"], KroneckerFactors(attention), saved / "folder")
    assert named_layers(["*.q_proj", "last-mlp"], factors, saved / "folder") == [
        "*.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert named_layers(None, factors, None) is None
    assert set(PRESETS) >= {"last-mlp", "mlp", "attention"}


# Inspection -----------------------------------------------------------------------------------------------------------


def test_inspect_shows_a_table(saved, tmp_path, capsys):
    run(*command(saved, tmp_path, "--layers", "model.layers.1.mlp.*", "--energy", 0.7, "--json"))
    done = json.loads(capsys.readouterr().out)["layers"]
    run("inspect", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "||W'-W||/||W||" in shown
    for name, edit in done.items():
        row = [name, "0.7", str(edit["num_inputs"]), f"{edit['relative_change']:.3f}", f"{edit['predicted_loss']:.2g}"]
        assert row in [line.split() for line in shown.splitlines()]
    assert "{" not in shown
    run("inspect", tmp_path / "out", "--json")
    assert json.loads(capsys.readouterr().out)["edit"]["layers"].keys() == done.keys()
    with pytest.warns(UserWarning, match="edited already"):
        run(
            "edit",
            "--checkpoint",
            tmp_path / "out",
            "--factors",
            saved / "factors.safetensors",
            "--out",
            tmp_path / "again",
            "--layers",
            "*.q_proj",
        )
    capsys.readouterr()
    run("inspect", tmp_path / "again")
    shown = capsys.readouterr().out
    before, _, earlier = shown.partition("Edited before:")
    assert "q_proj" in before
    assert "mlp" in earlier
    run("inspect", saved / "delta")
    assert "||W'-W||" in capsys.readouterr().out


def test_inspect_of_an_edit_that_says_little(tmp_path, capsys):
    """As earlier versions wrote it, or a file from elsewhere."""
    torch.save(
        {"state_dict": {"a.weight": torch.ones(1)}, "lightning_curvature": {"layers": {"a": {}}}}, tmp_path / "a.ckpt"
    )
    run("inspect", tmp_path / "a.ckpt")
    assert "a        not known  not known    not known" in capsys.readouterr().out
    eye = torch.eye(2)
    KroneckerFactors({"a": LayerFactors(A=eye, G=eye, num_inputs=3, num_gradients=3)}).save(tmp_path / "factors")
    run("inspect", tmp_path / "factors")
    assert "K-FAC factors" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="none: no such file or folder"):
        run("inspect", tmp_path / "none")
