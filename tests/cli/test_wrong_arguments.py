"""Wrong arguments of commands on saved models are told before a model is loaded."""

import re

import pytest
from transformers import AutoModelForCausalLM

from tests.support.commands import arguments, replaced, run

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
    ("evaluate", "--reference", None, "name the edited checkpoint"),
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
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
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
        ("evaluate", {"--sequences": None, "--half": "tuning"}, "--half would be ignored: there is no --sequences"),
        ("evaluate", {"--corpus": None, "--tokens": "99"}, "--tokens would be ignored: there is no --corpus"),
        ("evaluate", {"--corpus": None, "--context": "9"}, "--context would be ignored: there is no --corpus"),
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
