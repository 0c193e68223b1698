"""No command writes over what is there without a word, nor into a model that it reads."""

import os
import shutil

import pytest
from transformers import AutoModelForCausalLM

from tests.support.commands import arguments, replaced, run


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
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
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
