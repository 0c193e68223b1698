"""The command line's own manners: exit codes, errors, help, JSON, completion."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.cli import parser as cli
from lightning_curvature.cli.parser import COMMANDS, main
from lightning_curvature.demos.digits import run_digits


@pytest.fixture
def files(tmp_path):
    A, G = torch.diag(torch.arange(6.0) + 1), torch.diag(torch.arange(4.0) + 1)
    layers = {"fc": LayerFactors(A=A, G=G, num_inputs=50, num_gradients=50)}
    KroneckerFactors(layers, {"fisher": "sketched"}).save(tmp_path / "f.safetensors")
    save_file({"fc.weight": torch.ones(4, 6)}, tmp_path / "a.safetensors")
    return tmp_path


def edit(folder, *more):
    return [
        "edit",
        "--checkpoint",
        str(folder / "a.safetensors"),
        "--factors",
        str(folder / "f.safetensors"),
        "--out",
        str(folder / "b.safetensors"),
        *more,
    ]


def process(*args):
    command = [sys.executable, "-m", "lightning_curvature", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_exit_codes_and_tracebacks(files):
    done = process(*edit(files))
    assert (done.returncode, done.stderr) == (0, "")  # not even a progress bar: it is no terminal
    assert "fc -> fc.weight" in done.stdout
    failed = process(*edit(files))
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: ")
    assert "b.safetensors exists" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""
    traced = process(*edit(files, "--debug"))
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr
    wrong = process("edit", "--checkpoint", files / "a.safetensors")
    assert wrong.returncode == 2
    assert "required: edit.factors, edit.out" in wrong.stderr
    assert process("edit", "--dry-runs").returncode == 2
    both = process(*edit(files, "--dry-run", "--overwrite", "--layers", "f*", "--layers", "fc"))
    assert both.returncode == 0
    assert process(*edit(files, "--dry-run", "--overwrite", "--layers", '["f*", "fc"]')).returncode == 0
    assert "'g*' matches no layer" in process(*edit(files, "--overwrite", "--layers", "g*", "--layers", "fc")).stderr
    again = process(
        "edit", "--checkpoint", files / "b.safetensors", *edit(files)[3:5], "--out", files / "c.safetensors"
    )
    assert again.stderr.startswith("Warning: ")
    assert "is edited already" in again.stderr
    config = files / "c.yaml"
    config.write_text("model: {class_path: nothing.Model}\n")
    assert process("fit", "--config", config).returncode == 2


@pytest.mark.parametrize("words", [[], ["demo"]])
def test_the_list_of_commands_is_a_list_of_commands(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    assert "(required)" not in capsys.readouterr().out


def test_an_unexpected_error_says_its_kind(files, monkeypatch):
    def broken(*args):
        raise KeyError("x")

    monkeypatch.setattr("lightning_curvature.report.inspection.describe", broken)
    with pytest.raises(SystemExit, match="Error: KeyError: 'x'"):
        main(["inspect", str(files / "f.safetensors")])
    with pytest.raises(KeyError):
        main(["inspect", str(files / "f.safetensors"), "--debug"])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect", "Interrupted."),
        ("collect", "Interrupted. Run the same command again to continue from OUT.partial, as last saved."),
        ("sweep", "Interrupted. Run the same command again to make the edits that are not in sweep.csv yet."),
    ],
)
def test_an_interruption_is_one_line(monkeypatch, capsys, command, said):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    with pytest.raises(SystemExit) as stop:
        cli.main([command])
    assert stop.value.code == 130
    assert capsys.readouterr() == ("", f"\n{said}\n")
    with pytest.raises(KeyboardInterrupt):
        cli.main([command, "--debug"])


def test_json(files, capsys):
    def run(*args):
        main([*map(str, args), "--json"])
        return json.loads(capsys.readouterr().out)

    plan = run(*edit(files, "--dry-run", "--energy", "0.5"))
    assert plan["report"]["layers"]["fc"]["energy"] == 0.5
    assert (plan["bytes_read"], plan["bytes_written"]) == (192, 96)
    done = run(*edit(files, "--energy", '{"f*": 0.7}', "--save-delta", str(files / "d.safetensors")))
    assert done["layers"]["fc"]["energy"] == 0.7
    assert done["layers"]["fc"]["tensor"] == "fc.weight"
    assert done["layers"]["fc"]["changed"] == 14
    facts = run("inspect", files / "b.safetensors")
    assert facts["edit"]["layers"] == {
        "fc": {
            "energy": 0.7,
            "positions": 50,
            **{key: done["layers"]["fc"][key] for key in ("relative_change", "predicted_loss")},
        }
    }
    assert run("inspect", files / "f.safetensors")["layers"]["fc"]["shape"] == [4, 6]
    out = files / "back.safetensors"
    revert = ("--checkpoint", files / "b.safetensors", "--delta", files / "d.safetensors", "--out", out)
    assert run("revert", *revert) == {"out": str(out)}
    assert out.read_bytes() == (files / "a.safetensors").read_bytes()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_has_an_example_that_parses(command, capsys):
    from lightning_curvature.cli.parser import make_parser

    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    examples = capsys.readouterr().out.partition("example:\n")[2].strip().splitlines()
    for example in examples:
        program, *words = example.split()
        assert program == "lightning-curvature"
        assert " ".join(words).startswith(f"{command} ")
        make_parser().parse_args(words)
    assert examples


def test_completion_as_jsonargparse_offers_it():
    done = process("--print_completion", "shtab-bash")
    assert done.returncode == 0
    assert "--save-delta" in done.stdout


# What is imported ----------------------------------------------------------------------------------------------------


SLOW = {
    "torch",
    "numpy",
    "scipy",
    "safetensors",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    "transformers",
    "torchvision",
    "sklearn",
    "matplotlib",
}

RUN = """
import contextlib, io, json, sys
from lightning_curvature.cli.parser import main
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(args)
        except SystemExit as stop:
            code = stop.code
        else:
            code = 0
    print(json.dumps([code, sorted({name.partition(".")[0] for name in sys.modules})]))
"""


def imported(*commands):
    """Run commands in one new process; return by command what it ended with, and the slow packages imported by then."""
    given = [[str(word) for word in words] for words in commands]
    command = [sys.executable, "-c", RUN, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = map(json.loads, done.stdout.splitlines())
    return {" ".join(words): (code, SLOW & set(modules)) for words, (code, modules) in zip(given, results, strict=True)}


def test_help_usage_errors_and_completion_import_nothing_slow():
    asked = [["--help"], *([*command.split(), "--help"] for command in COMMANDS), ["--print_completion", "shtab-bash"]]
    loaded = imported(*asked)
    assert loaded == {" ".join(words): (0, set()) for words in asked}
    wrong = [
        [],
        ["colect"],
        ["collect"],
        ["edit", "--dry-runs"],
        ["collect", "--tokens", "many"],
        ["merge"],
        ["demo"],
        ["demo", "digts"],
        ["inspect"],
        ["sweep", "--energies", "a"],
    ]
    assert imported(*wrong) == {" ".join(words): (2, set()) for words in wrong}
    failing = [
        "mine --model m --corpus none.txt --out o",
        "evaluate --model m",
        "report none",
        "merge none.safetensors --out o",
        "collect --model m --corpus none.txt --out o --fisher true",
        "detect --factors none.safetensors --out o",
        "sweep --model m --factors f --sequences s --corpus c --out o --scores kfc",
    ]
    for code, modules in imported(*map(str.split, failing)).values():
        assert str(code).startswith("Error: ")
        assert modules == set()


def test_inspect_imports_torch_alone(files):
    main([*edit(files, "--save-delta", str(files / "d.safetensors"))])
    torch.save({"fc.weight": torch.ones(4, 6)}, files / "c.pt")
    folder = files / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((files / "b.safetensors").read_bytes())
    names = ("f.safetensors", "a.safetensors", "b.safetensors", "d.safetensors", "c.pt", "model")
    loaded = imported(*(["inspect", files / name] for name in names), edit(files, "--overwrite"))
    for code, modules in loaded.values():
        assert code == 0
        assert modules <= {"torch", "numpy", "safetensors"}


def test_public_names_are_imported_when_they_are_asked_for():
    code = """
import sys
import lightning_curvature
assert not {"torch", "lightning"} & set(sys.modules)
assert set(lightning_curvature.__all__) <= set(dir(lightning_curvature))
from lightning_curvature import CurvatureEditor, EditReport, KroneckerFactors, LayerFactors
assert lightning_curvature.KroneckerFactors is KroneckerFactors
assert not {"lightning", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    import lightning_curvature

    with pytest.raises(AttributeError, match="module 'lightning_curvature' has no attribute 'KFACCallback'"):
        _ = lightning_curvature.KFACCallback


def test_command_line_errors(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "digits"])
    assert stop.value.code == 2
    assert "out" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.delitem(sys.modules, "lightning_curvature.demos.digits")
    with pytest.raises(SystemExit, match=r"pip install 'lightning_curvature\[demo\]'"):
        main(["demo", "digits", "--out", str(tmp_path)])
    assert callable(run_digits)


def test_importing_the_package_imports_no_extra():
    code = """
import sys, lightning.pytorch, torchmetrics, einops, safetensors.torch, tabulate
before = set(sys.modules)
import lightning_curvature
heavy = {"transformers", "torchvision", "matplotlib", "sklearn", "jsonargparse"}
print(sorted(heavy & ({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
