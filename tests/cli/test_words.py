"""The words that options take."""

import typing

import pytest

from lightning_curvature.cli import choices as words
from lightning_curvature.cli.parser import COMMANDS, choices, make_parser
from lightning_curvature.editing.scores import SCORES
from lightning_curvature.recording import positions
from lightning_curvature.recording.fisher import FISHER_KINDS
from lightning_curvature.recording.options import ACCUMULATE_ON
from lightning_curvature.text import sequences
from tests.support.commands import arguments, replaced, run


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
