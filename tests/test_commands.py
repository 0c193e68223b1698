"""What commands on saved models look at before they load one, and what they say of wrong arguments."""

import argparse
import json
import os
import re
import shutil
import typing

import pytest
import torch
import transformers
from safetensors.torch import save_file

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.cli import choices as words
from lightning_curvature.cli.parser import COMMANDS, choices, main, make_parser
from lightning_curvature.collect.collector import ACCUMULATE_ON
from lightning_curvature.collect.passes import collect
from lightning_curvature.editing.origin import check_loaded
from lightning_curvature.editing.scores import SCORES
from lightning_curvature.recording import positions
from lightning_curvature.recording.fisher import FISHER_KINDS
from lightning_curvature.storage import jsonl
from lightning_curvature.text import collecting, models, sequences
from lightning_curvature.text.evaluation import perplexity
from tests import language


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


def arguments(folder, tmp_path, command):
    model, corpus = ["--model", folder / "model"], ["--corpus", folder / "c.jsonl"]
    asked, factors = ["--sequences", folder / "s.jsonl"], ["--factors", folder / "f.safetensors"]
    return {
        "collect": [*model, *corpus, "--out", tmp_path / "o.safetensors"],
        "mine": [*model, *corpus, "--prefix", 8, "--suffix", 8, "--out", tmp_path / "o.jsonl"],
        "evaluate": [*model, *corpus, *asked, "--out", tmp_path / "o.json"],
        "sweep": [*model, *corpus, *asked, *factors, "--out", tmp_path / "o"],
        "detect": [*model, *corpus, *factors, "--out", tmp_path / "o.csv"],
    }[command]


def run(*args):
    main([str(arg) for arg in args])


def replaced(args, option, value):
    """Arguments with another value of an option, or with one more option; None takes it away."""
    args = list(args)
    if option in args:
        place = args.index(option)
        args[place : place + 2] = []
    return args if value is None else [*args, option, value]


WRONG = [
    # (commands, option, value, what is said); a value that begins with @ is a path
    ("collect mine evaluate sweep detect", "--corpus", "@none.txt", r"No such file: .*none\.txt \(--corpus\)"),
    ("collect mine evaluate sweep detect", "--corpus", "@model", r"--corpus .*model is a folder; it names a file"),
    ("collect mine evaluate sweep detect", "--corpus", "@empty.txt", "empty.txt: the file is empty; expected text"),
    ("collect mine evaluate sweep detect", "--corpus", "@empty.jsonl", "empty.jsonl: the file is empty; expected one"),
    ("collect mine evaluate sweep detect", "--corpus", "@binary.txt", "binary.txt: not UTF-8"),
    ("collect mine evaluate sweep detect", "--corpus", "@bad.jsonl", "bad.jsonl, line 2: not JSON in UTF-8"),
    ("collect mine evaluate sweep detect", "--corpus", "@other.jsonl", r"other.jsonl, line 1: lacks \['text'\]"),
    ("collect mine evaluate sweep detect", "--model", "@none", "none is no folder"),
    ("collect mine evaluate sweep detect", "--model", "@f.safetensors", "f.safetensors is no folder"),
    ("collect mine evaluate sweep detect", "--checkpoint", "@none.ckpt", r"No such file: .*none\.ckpt \(--checkpoint"),
    ("collect mine evaluate sweep detect", "--checkpoint", "@f.safetensors", "holds K-FAC factors, not weights"),
    ("collect mine evaluate sweep detect", "--batch-size", "0", "--batch-size must be an integer of at least 1, found"),
    ("collect mine evaluate sweep detect", "--batch-size", "-3", "--batch-size must be an integer of at least 1, foun"),
    ("collect evaluate sweep detect", "--context", "0", "--context must be an integer of at least 1, found 0"),
    ("collect evaluate sweep detect", "--context", "90", "Windows of 90 tokens are longer than the model's context"),
    ("collect evaluate sweep detect", "--tokens", "-1", "--tokens must be an integer of at least 1, found -1"),
    ("collect evaluate sweep detect", "--tokens", "9", "A limit of 9 tokens is shorter than one window of 6"),
    ("collect mine evaluate sweep detect", "--corpus", "@c.json", r"c\.json: text in JSON is read line by line, "),
    ("collect mine evaluate sweep detect", "--corpus", "@c.NDJSON", "NDJSON: text in JSON is read line by line"),
    ("collect mine evaluate sweep detect", "--corpus", "@c.jsonl.gz", r"gz is compressed; expected text.*Unpack it"),
    ("evaluate sweep", "--sequences", "@c.jsonl.gz", r"gz is compressed; expected JSON lines. Unpack it first"),
    ("evaluate sweep", "--sequences", "@none.jsonl", r"No such file: .*none\.jsonl \(--sequences\)"),
    ("evaluate sweep", "--sequences", "@empty.jsonl", "empty.jsonl: the file is empty"),
    ("evaluate sweep", "--sequences", "@c.jsonl", r"c.jsonl, line 1: lacks \['prefix_ids', 'suffix_ids'\]"),
    ("evaluate", "--sequences", "@far.jsonl", "Sequence 0 holds the token 50, the model's vocabulary has 40"),
    ("evaluate", "--sequences", "@long.jsonl", r"Sequence 0 has 60 \+ 9 tokens, the model's context is 64"),
    ("collect evaluate sweep detect", "--context", "1", "In a window of 1 tokens there is nothing to predict"),
    ("sweep detect", "--factors", "@none.safetensors", r"No such file: .*none\.safetensors"),
    ("sweep detect", "--factors", "@w.safetensors", r"w.safetensors holds weights \(1 tensors\), not factors"),
    ("sweep detect", "--factors", "@model", r"model holds weights \(\d+ tensors\), not factors"),
    ("sweep detect", "--factors", "@broken.safetensors", "broken.safetensors: not a complete factor file"),
    ("collect", "--layers", "nothing.*", r"layers='nothing\.\*' is no preset .* and matches no editable layer"),
    ("collect", "--layers", "*.up_proj,*.down_proj", "matches no editable layer"),
    ("collect", "--passes", "0", "--passes must be an integer of at least 1, found 0"),
    ("collect", "--draws", "0", "--draws must be an integer of at least 1, found 0"),
    ("collect", "--save-every", "0", "--save-every must be an integer of at least 1, found 0"),
    ("collect", "--share", "0", r"--share must be a number in \(0, 1\], found 0"),
    ("collect", "--fisher", "true", r"fisher must be one of \['sketched', 'sampled', 'exact', 'empirical'\]"),
    ("collect", "--positions", "mask:x", r"positions must be one of \['contributing', 'all', 'first'\]"),
    ("collect", "--accumulate-on", "disk", r"accumulate_on must be one of \['auto', 'model', 'cpu'\]"),
    ("collect", "--out", "@new.pt", r"new\.pt: factors are written to a safetensors file"),
    ("collect mine evaluate detect", "--out", "@model", r"--out .*model is a folder; it names a file to write"),
    ("sweep", "--out", "@c.jsonl", r"--out .*c\.jsonl is a file; it names a folder to write"),
    ("mine", "--prefix", "0", "--prefix must be an integer of at least 1, found 0"),
    ("mine", "--stride", "0", "--stride must be an integer of at least 1, found 0"),
    ("mine", "--windows", "-1", "--windows must be an integer of at least 1, found -1"),
    *(
        ("mine", "--similarity", wrong, rf"--similarity must be a number in \(0, 1\], found {wrong}\.0\.$")
        for wrong in "20"
    ),
    ("mine", "--prefix", "60", r"its longest document has 17 tokens, a window has 60 \+ 8"),
    ("evaluate", "--half", "third", r"half must be one of \['tuning', 'validation'\], found 'third'"),
    ("evaluate", "--reference", None, "name the edited checkpoint, too"),
    ("evaluate", "--recall", "@s.jsonl", r"s.jsonl, line 1: lacks \['prompt', 'answers'\]"),
    ("sweep", "--energies", "0", r"--energies must be in \(0, 1\], found 0"),
    ("sweep", "--layers", "a,,b", "a choice is one or several patterns with commas between"),
    ("sweep", "--layers", "x*", r"Pattern 'x\*' matches no layer"),
    ("sweep", "--scores", "kfc", r"scores must be one of .*, found 'kfc'. Did you mean"),
    ("sweep", "--bases", "@c.jsonl", r"--bases .*c\.jsonl is a file; it names a folder"),
    ("sweep", "--bases", "@model", r"--bases .*model is or lies in .*model, which is read"),
    ("sweep", "--bases", "@model/bases", r"--bases .*bases is or lies in .*model, which is read"),
    ("evaluate", "--recall", "@blank.jsonl", r"blank\.jsonl, line 1: the prompt is empty"),
    ("evaluate", "--recall", "@bad.jsonl", r"bad\.jsonl, line 1: lacks \['prompt', 'answers'\]"),
    ("collect mine evaluate detect", "--out", "@bad.jsonl/x", r"bad\.jsonl/x cannot be written: .*bad\.jsonl is a f"),
    ("detect", "--layer", "up", "The factors hold no layer 'up'"),
    ("detect", "--positions", "first", "--positions first is for images; of a window of text all positions count"),
]


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [(command, *rest) for commands, *rest in WRONG for command in commands.split()],
    ids=lambda value: None if value is None else re.sub(r"[^\w.*,-]", "", str(value))[:24],
)
def test_a_wrong_argument_is_told_before_the_model_is_loaded(
    folder, tmp_path, monkeypatch, command, option, value, message
):
    monkeypatch.setattr(models, "_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    given = folder / value[1:] if value is not None and value.startswith("@") else value
    args = (
        [*arguments(folder, tmp_path, command), option]
        if given is None
        else replaced(arguments(folder, tmp_path, command), option, given)
    )
    with pytest.raises(SystemExit, match=message) as stop:
        run(command, *args)
    said = str(stop.value)
    assert "Errno" not in said
    assert re.match(r"Error: (?!\w+Error)", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("evaluate", {"--sequences": None, "--half": "tuning"}, "--half would be ignored: it is about the sequences"),
        ("evaluate", {"--corpus": None, "--tokens": "99"}, "--tokens would be ignored: it is about the text"),
        ("evaluate", {"--corpus": None, "--context": "9"}, "--context would be ignored: it is about the text"),
        ("evaluate", {"--sequences": None, "--corpus": None}, "Nothing to measure on: give at least one of"),
        ("detect", {"--corpus": None, "--sequences": "s.jsonl", "--context": "9"}, "--context would be ignored"),
        ("detect", {"--corpus": None}, "Give what to rank: either --sequences or --corpus"),
        ("detect", {"--sequences": "s.jsonl"}, "Give what to rank: either --sequences or --corpus"),
        ("collect", {"--fisher": "exact", "--draws": "4"}, "--draws would be ignored: fisher exact has no draws"),
        ("collect", {"--fisher": "empirical", "--draws": "4"}, "--draws would be ignored: fisher empirical has no"),
    ],
)
def test_options_that_would_be_ignored(folder, tmp_path, command, more, message):
    args = arguments(folder, tmp_path, command)
    for option, value in more.items():
        args = replaced(args, option, folder / value if value is not None and "." in value else value)
    with pytest.raises(SystemExit, match=message):
        run(command, *args)


@pytest.mark.parametrize("command", ["collect", "mine", "evaluate", "detect"])
def test_what_is_there_is_not_written_over_without_a_word(folder, tmp_path, monkeypatch, command):
    args = arguments(folder, tmp_path, command)
    out = args[args.index("--out") + 1]
    out.write_text("precious")
    with pytest.raises(SystemExit, match=rf"{out.name} exists. Choose another path, or --overwrite it"):
        run(command, *args)
    with pytest.raises(SystemExit, match=r"c\.jsonl is the source itself, or another file that is read"):
        run(command, *replaced(args, "--out", folder / "c.jsonl"), "--overwrite")
    assert out.read_text() == "precious"
    assert (folder / "c.jsonl").read_text()
    if command == "mine":  # this model recites nothing
        with pytest.raises(SystemExit, match="recites none of them; nothing was written"):
            run(command, *args, "--overwrite")
        assert out.read_text() == "precious"
    else:
        run(command, *args, "--overwrite")
        assert out.read_bytes() != b"precious"


@pytest.mark.parametrize("more", [(), ("--overwrite",)])
@pytest.mark.parametrize("place", ["model/config.json", "model/new.x", "edited/config.json", "model", "linked"])
@pytest.mark.parametrize("command", ["collect", "mine", "evaluate", "sweep", "detect"])
def test_no_output_lies_in_a_model_that_is_read(folder, tmp_path, monkeypatch, command, place, more):
    monkeypatch.setattr(models, "_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    for name in ("model", "edited"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "model" / "config.json").rename(tmp_path / "linked")
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "linked")
    if command == "sweep":
        more = ()
        if place.endswith(".x"):
            (tmp_path / place).mkdir()  # an empty folder is as good as none
    args = replaced(arguments(folder, tmp_path, command), "--model", tmp_path / "model")
    args = [*replaced(args, "--out", tmp_path / place), "--checkpoint", tmp_path / "edited", *more]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SystemExit, match=r"lie one inside the other|is the source itself|names a f"):
        run(command, *args)
    if command == "evaluate" and place == "linked":
        page = ["--reference", "--examples", tmp_path / "edited" / "config.json"]
        with pytest.raises(SystemExit, match=r"lie one inside the other"):
            run(command, *replaced(args, "--out", tmp_path / "o.json"), *page)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_examples_are_not_written_over_either(folder, tmp_path):
    args = [*arguments(folder, tmp_path, "evaluate"), "--reference", "--checkpoint", folder / "edited"]
    page = tmp_path / "x.md"
    page.write_text("precious")
    with pytest.raises(SystemExit, match=r"x\.md exists"):
        run("evaluate", *args, "--examples", page)
    with pytest.raises(SystemExit, match=r"o\.json is named twice"):
        run("evaluate", *args, "--examples", tmp_path / "o.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config", "none.yaml", "--checkpoint", "w.safetensors"], r"No such file: none\.yaml \(--config\)"),
        (["--config", "digits.yaml", "--checkpoint", "none.ckpt"], r"No such file: .*none\.ckpt \(--checkpoint\)"),
        (["--config", "digits.yaml", "--checkpoint", "model"], r"--checkpoint .*model is a folder; it names a file"),
        (["--config", "digits.yaml", "--checkpoint", "f.safetensors"], "f.safetensors holds K-FAC factors, not weight"),
        (["--config", "digits.yaml", "--checkpoint", "w.safetensors", "--layer", "up"], "hold no layer 'up'"),
        (["--config", "digits.yaml", "--checkpoint", "w.safetensors", "--context", "9"], "--context would be ignored"),
        (["--config", "digits.yaml"], "for images --config with --checkpoint"),
    ],
)
def test_wrong_arguments_of_images(folder, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr("lightning_curvature.cli.lightning.instances", lambda _: pytest.fail("the model was made"))
    args = [folder / word if (folder / word).exists() or word == "none.ckpt" else word for word in more]
    with pytest.raises(SystemExit, match=message):
        run("detect", "--factors", folder / "f.safetensors", "--out", tmp_path / "o.csv", *args)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_that_cannot_be_written(folder, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit, match=r"o\.safetensors cannot be written: .* is not yours to write to"):
        run("collect", *arguments(folder, tmp_path, "collect"))
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("kind", ["digits", "text"])
def test_a_demo_does_not_write_into_a_folder_with_files(tmp_path, kind):
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(SystemExit, match=r"exists. Choose another path, or --overwrite it"):
        run("demo", kind, "--out", tmp_path)


@pytest.mark.parametrize("command", ["sweep", "detect"])
def test_factors_of_another_model_are_refused(folder, tmp_path, command, recwarn):
    args = arguments(folder, tmp_path, command)
    if command == "sweep":
        args += ["--energies", "0.9"]
    other = ["--checkpoint", folder / "edited"]
    with pytest.raises(SystemExit, match=r"edited have other weights than those .*another model\? .* add --force"):
        run(command, *args, *other)
    with pytest.raises(SystemExit, match=r"edited have other weights than those"):
        run(command, *replaced(args, "--model", folder / "edited"))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="edited have other weights than those that the factors were collected on"):
        run(command, *args, *other, "--force")
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
    found = json.loads((tmp_path / "o.json").read_text())
    assert loaded == [str(folder / "model"), str(folder / "edited")]
    ids = [token for row in language.tokens(16, 16).tolist() for token in [*row, 0]]
    windows = torch.tensor([ids[i : i + 16] for i in range(0, len(ids) - 15, 16)])
    for name, seed in (("before", 0), ("after", 3)):
        assert found[name]["perplexity"] == pytest.approx(perplexity(language.model("llama", seed), windows), rel=1e-5)
    assert page.read_text().count("### ") == 20
    for command in ("collect", "detect"):  # everywhere that a checkpoint is taken
        out = tmp_path / "other" / command
        args = replaced(arguments(folder, tmp_path, command), "--out", out.with_suffix(".safetensors"))
        args += ["--force"] * (command == "detect")  # the factors are those of the first
        run(command, *args, "--checkpoint", folder / "edited")
        alone = replaced(replaced(args, "--out", out.with_suffix(".own.safetensors")), "--model", folder / "edited")
        run(command, *alone)
        one, two = out.with_suffix(".safetensors"), out.with_suffix(".own.safetensors")
        if command == "collect":
            assert KroneckerFactors.load(one).digest() == KroneckerFactors.load(two).digest()
        else:
            assert one.read_text() == two.read_text()


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
    found = json.loads(capsys.readouterr().out)["model"]["perplexity"]
    ids = [token for row in language.tokens(16, 16).tolist() for token in [*row, 0]]
    windows = torch.tensor([ids[i : i + 64] for i in range(0, len(ids) - 63, 64)])
    assert found == pytest.approx(perplexity(language.model("llama"), windows), rel=1e-5)
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
    step, steps = collecting._step, []

    def interrupted(*given):
        steps.append(1)
        if len(steps) == 11:  # in the second pass
            raise KeyboardInterrupt
        step(*given)

    monkeypatch.setattr(collecting, "_step", interrupted)
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


def test_help_lists_words_and_no_types_of_python(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            run(*command.split(), "--help")
        text = capsys.readouterr().out
        assert "type:" not in text
        assert "<class" not in text
        assert "null" not in text
    for command, shown in {
        "collect": ["{sketched,sampled,exact,empirical}", "{contributing,all,first}", "{auto,model,cpu}"],
        "evaluate": ["{tuning,validation}"],
        "sweep": ["{tuning,validation}", "{kfac,ekfac,coupled,activations,saliency}"],
        "detect": ["{all,first}"],
    }.items():
        with pytest.raises(SystemExit):
            run(command, "--help")
        text = capsys.readouterr().out
        assert all(f"{option}\n" in text or f"{option} " in text for option in shown)


def test_the_words_are_those_that_are_taken():
    assert choices(words.Fisher) == tuple(FISHER_KINDS)
    assert choices(words.Positions) == positions.POSITIONS
    assert set(choices(words.AccumulateOn)) == set(ACCUMULATE_ON)
    assert choices(words.Half) == sequences.HALVES
    assert set(choices(words.Score)) == set(SCORES)
    assert choices(list[words.Score] | None) == typing.get_args(words.Score)
    assert choices(str | None) == choices(int) == ()


def test_a_word_instead_of_a_number_is_a_wrong_command_line(folder, tmp_path, capsys):
    for option in ("--energies", "--tokens", "--batch-size"):
        with pytest.raises(SystemExit) as stop:
            run("sweep", *replaced(arguments(folder, tmp_path, "sweep"), option, "many"))
        assert stop.value.code == 2
        assert "many" in capsys.readouterr().err
    parsed = make_parser().parse_args(
        ["sweep", *map(str, arguments(folder, tmp_path, "sweep")), "--energies", "0.5", "0.9", "--energies", "1"]
    )
    assert parsed.sweep.energies == [0.5, 0.9, 1.0]


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
