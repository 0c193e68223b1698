"""Commands on saved models: other weights, classes in files, two folders, damaged progress."""

import argparse
import json
import re

import pytest
import torch
import transformers

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.editing.origin import check_loaded
from lightning_curvature.text import collecting, models
from lightning_curvature.text.evaluation import perplexity
from tests.support import language
from tests.support.commands import arguments, replaced, run


@pytest.mark.parametrize("command", ["sweep", "detect"])
def test_factors_of_another_model_are_refused(folder, tmp_path, command, recwarn):
    args = arguments(folder, tmp_path, command)
    if command == "sweep":
        args += ["--energies", "0.9"]
    edited = ["--checkpoint", folder / "edited"]
    with pytest.raises(SystemExit, match=r"edited have other weights than those .*another model\? .* add --force"):
        run(command, *args, *edited)
    with pytest.raises(SystemExit, match=r"edited have other weights than those"):
        run(command, *replaced(args, "--model", folder / "edited"))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="edited have other weights than those that the factors were collected on"):
        run(command, *args, *edited, "--force")
    args[args.index("--out") + 1] = tmp_path / "again"
    run(command, *args)
    factors = KroneckerFactors.open(folder / "f.safetensors")
    CurvatureEditor(0.5).edit_checkpoint(folder / "model", factors, tmp_path / "cut")
    args[args.index("--out") + 1] = tmp_path / "third"
    with pytest.warns(UserWarning, match=r"cut is an edited copy: the factors describe its layers .* as they were bef"):
        run(command, *args, "--checkpoint", tmp_path / "cut")


def test_weights_in_memory_are_compared_with_those_of_the_factors(folder, tmp_path, recwarn):
    factors = KroneckerFactors.open(folder / "f.safetensors")
    net, path = language.model("llama"), tmp_path / "lit.ckpt"
    torch.save({"state_dict": {f"net.{name}": value for name, value in net.state_dict().items()}}, path)
    names = {layer: layer for layer in factors}
    check_loaded(net.bfloat16(), names, factors, path)  # rounded, the weights are the same
    assert not recwarn
    net = language.model("llama")
    *_, last = names
    CurvatureEditor(0.5, [last]).edit_checkpoint(path, factors, tmp_path / "cut.ckpt")
    CurvatureEditor(0.5, [last]).edit(net, factors)
    with pytest.warns(UserWarning, match=rf"cut\.ckpt is an edited copy: .* its layers '{last}' as they were before"):
        check_loaded(net, names, factors, tmp_path / "cut.ckpt")
    with torch.no_grad():
        net.get_parameter(f"{next(iter(names))}.weight").mul_(1.5)
    with (
        pytest.warns(UserWarning, match="edited copy"),
        pytest.raises(ValueError, match=r"1 of 6 layers .* the furthest is 0\.5 of its norm away"),
    ):
        check_loaded(net, names, factors, tmp_path / "cut.ckpt")


@pytest.mark.parametrize("command", ["collect", "mine", "evaluate", "sweep", "detect"])
def test_classes_that_a_checkpoint_holds_can_be_allowed(folder, tmp_path, command):
    path = tmp_path / "m.ckpt"
    state = {f"net.{name}": value for name, value in language.model("llama").state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(lr=0.1)}, path)
    args = [*arguments(folder, tmp_path, command), "--checkpoint", path]
    args += {"sweep": ["--energies", "0.9"], "evaluate": ["--reference"]}.get(command, [])
    with pytest.raises(SystemExit, match=r"add --allow-global argparse.Namespace"):
        run(command, *args)
    with pytest.raises(SystemExit, match=r"'Namespace' is no full name of a class. Give it with its module"):
        run(command, *args, "--allow-global", "Namespace")
    allowed = [*args, "--allow-global", "argparse.Namespace"]
    if command == "mine":
        with pytest.raises(SystemExit, match="recites none of them"):
            run(command, *allowed)
    else:
        run(command, *allowed)
    for option, value in (("--checkpoint", folder / "edited"), ("--checkpoint", None)):
        with pytest.raises(SystemExit, match=r"--allow-global is for files of torch.save"):
            run(command, *replaced(allowed, option, value), *([] if command == "sweep" else ["--overwrite"]))


@pytest.mark.parametrize("data", ["--corpus", "--sequences", "--recall"])
@pytest.mark.parametrize("reference", [False, True])
def test_a_model_that_says_nothing_finite(folder, tmp_path, reference, data):
    net, path = language.model("llama"), tmp_path / "nan.pt"
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "w1 w2", "answers": ["w3"]}))
    files = {"--corpus": folder / "c.jsonl", "--sequences": folder / "s.jsonl", "--recall": tmp_path / "r.jsonl"}
    args = ["--model", folder / "model", "--checkpoint", path, data, files[data], "--out", tmp_path / "o.json"]
    for value, said in ((float("nan"), "NaN or infinite are weights of 'model.norm.weight'"), (3e38, "too large")):
        with torch.no_grad():
            net.model.norm.weight.fill_(value)
        torch.save(net.state_dict(), path)
        with pytest.raises(SystemExit, match=rf"nan\.pt: what the model says is not finite.*{said}"):
            run("evaluate", *args, *["--reference"] * reference)
    assert not (tmp_path / "o.json").exists()


def test_a_corpus_that_does_not_tell_what_an_edit_costs(folder, tmp_path):
    """What the edited layer says is multiplied by zero: its edits cost nothing, however strong they are."""
    net, layer = language.model("llama"), "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        net.model.layers[1].mlp.down_proj.weight.zero_()
    net.save_pretrained(tmp_path / "m")
    language.tokenizer().save_pretrained(tmp_path / "m")
    args = ["--checkpoint", tmp_path / "m", "--factors", folder / "f.safetensors", "--layers", layer, "--context", 16]
    args += ["--corpus", folder / "c.jsonl", "--perplexity", "1.1", "--out", tmp_path / "o"]
    with (
        pytest.warns(UserWarning, match="Every edit that was tried stays within"),
        pytest.raises(SystemExit, match=r"c\.jsonl does not tell what the edit costs: .* than 0\.1% .* --energy"),
    ):
        run("edit", *args)
    assert not (tmp_path / "o").exists()


@pytest.mark.filterwarnings("ignore:.* have other weights than those")
def test_two_folders_are_compared(folder, tmp_path, monkeypatch, capsys):
    """The edited folder's weights in the other one's place; a model is loaded once for each."""
    loaded, load = [], transformers.AutoModelForCausalLM.from_pretrained

    def counted(path, **options):
        loaded.append(path)
        return load(path, **options)

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", counted)
    page = tmp_path / "x.md"
    run(
        "evaluate",
        *arguments(folder, tmp_path, "evaluate"),
        "--context",
        16,
        "--reference",
        "--checkpoint",
        folder / "edited",
        "--examples",
        page,
    )
    results = json.loads((tmp_path / "o.json").read_text())
    assert loaded == [str(folder / "model"), str(folder / "edited")]
    ids = [token for row in language.tokens(16, 16).tolist() for token in [*row, 0]]
    windows = torch.tensor([ids[i : i + 16] for i in range(0, len(ids) - 15, 16)])
    for name, seed in (("before", 0), ("after", 3)):
        assert results[name]["perplexity"] == pytest.approx(
            perplexity(language.model("llama", seed), windows), rel=1e-5
        )
    assert page.read_text().count("### ") == 20
    for command in ("collect", "detect"):  # everywhere that a checkpoint is taken
        out = tmp_path / "other" / command
        args = replaced(arguments(folder, tmp_path, command), "--out", out.with_suffix(".safetensors"))
        args += ["--force"] * (command == "detect")  # the factors are those of the first
        run(command, *args, "--checkpoint", folder / "edited")
        alone = replaced(replaced(args, "--out", out.with_suffix(".own.safetensors")), "--model", folder / "edited")
        run(command, *alone)
        with_checkpoint, as_model = out.with_suffix(".safetensors"), out.with_suffix(".own.safetensors")
        if command == "collect":
            assert KroneckerFactors.load(with_checkpoint).digest() == KroneckerFactors.load(as_model).digest()
        else:
            assert with_checkpoint.read_text() == as_model.read_text()


def test_the_weights_of_a_folder_must_fit(folder, tmp_path):
    language.model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(SystemExit, match="gpt2 holds no weights of a LlamaForCausalLM"):
        run("evaluate", *arguments(folder, tmp_path, "evaluate"), "--checkpoint", tmp_path / "gpt2")


def test_the_usual_window_is_what_a_short_model_takes(folder, tmp_path, capsys):
    """64 tokens here, where 512, 128 and 64 are usual."""
    run("collect", *arguments(folder, tmp_path, "collect"), "--json")
    (layer,) = json.loads(capsys.readouterr().out)["layers"].values()
    assert layer["num_seen"] == 256  # four windows of 64 of 272 tokens
    run("evaluate", *arguments(folder, tmp_path, "evaluate"), "--json")
    measured = json.loads(capsys.readouterr().out)["model"]["perplexity"]
    ids = [token for row in language.tokens(16, 16).tolist() for token in [*row, 0]]
    windows = torch.tensor([ids[i : i + 64] for i in range(0, len(ids) - 63, 64)])
    assert measured == pytest.approx(perplexity(language.model("llama"), windows), rel=1e-5)
    net, tokenizer = models.load_model(folder / "model"), language.tokenizer()
    again = collecting.collect_text(net, tokenizer, folder / "c.jsonl", tmp_path / "g.safetensors")
    assert again.digest() == KroneckerFactors.load(tmp_path / "o.safetensors").digest()


@pytest.mark.parametrize("what", ["cut", "text", "other", "empty", "folder", "piece"])
def test_progress_that_is_damaged_is_named(folder, tmp_path, monkeypatch, what):
    args = [
        *arguments(folder, tmp_path, "collect"),
        "--layers",
        "mlp",
        "--passes",
        "2",
        "--context",
        "16",
        "--batch-size",
        "2",
        "--save-every",
        "1",
    ]
    language.interrupt(monkeypatch, 11)  # in the second pass
    with pytest.raises(SystemExit) as stop:
        run("collect", *args)
    assert stop.value.code == 130
    partial = tmp_path / "o.safetensors.partial"
    content = partial.read_bytes()
    if what == "piece":
        (tmp_path / "o.safetensors.partial.0").write_bytes(b"x")
    elif what == "folder":
        partial.unlink()
        partial.mkdir()
    elif what == "other":
        torch.save({"epoch": 1}, partial)
    else:
        partial.write_bytes({"cut": content[: len(content) // 2], "text": b"hello", "empty": b""}[what])
    with pytest.raises(SystemExit, match=r"o\.safetensors\.partial, the progress of .*, is damaged .* Delete it"):
        run("collect", *args)


def test_no_bars_but_on_a_terminal(folder, tmp_path, capsys, monkeypatch):
    run("evaluate", *arguments(folder, tmp_path, "evaluate"), "--context", 16)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    run(
        "evaluate",
        *arguments(folder, tmp_path, "evaluate"),
        "--context",
        16,
        "--overwrite",
        "--reference",
        "--checkpoint",
        folder / "edited",
    )
    shown = capsys.readouterr().err
    assert len(set(re.findall(r"Loading weights", shown))) == 1
    assert shown.count("100%") == 1
