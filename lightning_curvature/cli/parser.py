"""The command line: ``lightning-curvature``, also ``python -m lightning_curvature``.

Exit codes: 0, 2 where the command line is wrong, 1 where the command fails, 130 where it is interrupted (Ctrl-C).
"""

import argparse
import dataclasses
import inspect
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from lightning_curvature._checks import check_option
from lightning_curvature.cli.choices import LIGHTNING
from lightning_curvature.cli.commands import analysis, checkpoints, demos, models
from lightning_curvature.cli.commands.output import Output

COMMANDS: dict[str, Callable[..., Output]] = {
    "demo digits": demos.digits,
    "demo text": demos.text,
    "collect": models.collect,
    "edit": checkpoints.edit,
    "revert": checkpoints.revert,
    "apply": checkpoints.apply,
    "inspect": checkpoints.inspect,
    "mine": models.mine,
    "evaluate": models.evaluate,
    "sweep": models.sweep,
    "report": analysis.report,
    "detect": analysis.detect,
}
POSITIONAL = ("path",)
DEVICES = {"device": ("auto", "cpu", "cuda", "cuda:N")}
"""Words of options that take others, too."""


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples; says defaults and choices, not types of Python."""

    def _get_help_string(self, action: argparse.Action) -> str:
        fact = "required" if action.required else f"default: {action.default}"
        plain = action.default in (None, False, argparse.SUPPRESS) or dataclasses.is_dataclass(action.default)
        return f"{action.help or ''}{f' ({fact})' if action.required or not plain else ''}"


def make_parser() -> ArgumentParser:
    """Return the parser of all commands but LightningCLI's."""
    set_parsing_settings(add_print_completion_argument=True)
    parser = ArgumentParser(
        prog="lightning-curvature",
        formatter_class=_HelpFormatter,
        description="Remove recitation from trained models.",
        epilog="fit, validate and test take the arguments of LightningCLI, for example:\n"
        "  lightning-curvature fit --config digits.yaml",
    )
    subcommands = parser.add_subcommands(dest="command")
    demo = ArgumentParser(formatter_class=_HelpFormatter, description="Train, edit and measure on embedded data.")
    subcommands.add_subcommand("demo", demo, help="Train, edit and measure on embedded data.")
    kinds = demo.add_subcommands(dest="demo")
    for name, function in COMMANDS.items():
        words = name.split()
        owner = kinds if words[0] == "demo" else subcommands
        doc = parse(function.__doc__ or "")
        owner.add_subcommand(words[-1], _command_parser(function), help=doc.short_description)
    return parser


def _command_parser(function: Callable[..., Output]) -> ArgumentParser:
    """Return the parser of a command: long options with hyphens, flags, lists, help and example from its docstring."""
    doc = parse(function.__doc__ or "")
    (example,) = doc.examples
    parser = ArgumentParser(
        formatter_class=_HelpFormatter,
        description=doc.short_description,
        epilog=f"example:\n{textwrap.indent(example.description or '', '  ')}",
    )
    hints = get_type_hints(function)
    texts = {parameter.arg_name: parameter.description for parameter in doc.params}
    for name, parameter in inspect.signature(function).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        option = name if name in POSITIONAL else f"--{name.replace('_', '-')}"
        options: dict[str, Any] = {"help": texts[name]}
        if words := choices(hints[name]) or DEVICES.get(name):
            options["metavar"] = f"{{{','.join(words)}}}"
        if hints[name] is bool:
            options |= {"action": "store_true"}
        elif kind := _item(hints[name]):
            options |= {"type": kind, "nargs": "+", "action": "extend"}
            options["metavar"] = (options["metavar"], "...") if words else name.upper()
        else:
            options["type"] = str | None if words else hints[name]
            if not required:
                options["default"] = parameter.default
            elif name not in POSITIONAL:
                options["required"] = True
        parser.add_argument(option, **options)
    parser.add_argument("--json", action="store_true", help="Print JSON, for programs.")
    parser.add_argument("--debug", action="store_true", help="Show where an error comes from.")
    return parser


def choices(hint: Any) -> tuple[str, ...]:
    """Return the words that a type hint allows, or nothing if it allows more than some words."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((words for part in get_args(hint) if (words := choices(part))), ())


def _item(hint: Any) -> type | None:
    """Return the type of the items of an optional list, or None if the hint is none of that."""
    lists = [part for part in get_args(hint) if get_origin(part) is list]
    (item,) = get_args(lists[0]) if lists else (None,)
    return str if get_origin(item) is Literal else item


def _run(args: list[str]) -> None:
    if args and args[0] in LIGHTNING:
        from lightning_curvature.cli.lightning import run

        run([argument for argument in args if argument != "--debug"])
        return
    parser = make_parser()
    given = parser.instantiate_classes(parser.parse_args(args))
    name, options = given.command, given[given.command]
    if name == "demo":
        name, options = f"demo {options.demo}", options[options.demo]
    values = {key: _words(value) for key, value in vars(options).items() if key not in ("json", "debug")}
    function = COMMANDS[name]
    hints = get_type_hints(function)
    for key, value in values.items():
        if words := choices(hints[key]):
            for word in value if isinstance(value, list) else [] if value is None else [value]:
                check_option(word, words, key)
    output = function(**values)
    sys.stdout.write(json.dumps(output.data, indent=2, default=_jsonable) if options.json else output.text)
    sys.stdout.write("\n")


def _words(value: Any) -> Any:
    """Return a list of words, of which some may be JSON lists, as one list; anything else as it is."""
    if not isinstance(value, list):
        return value
    return [word for given in value for word in (json.loads(given) if str(given).startswith('["') else [given])]


def _jsonable(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def _sentence(error: Exception) -> str:
    """Return what an error says, for people."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or os.strerror(error.errno)
        return f"{reason}: {error.filename}" if error.filename is not None else f"{reason}."
    plain = isinstance(error, (ValueError, OSError, RuntimeError)) and str(error)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def _interrupted(args: list[str]) -> str:
    """Return what a command says that was interrupted."""
    goes_on = {
        "collect": "The same command goes on from OUT.partial, where it last saved",
        "sweep": "The same command goes on with the edits that are not in sweep.csv yet",
    }.get(args[0] if args else "")
    return "Interrupted." if goes_on is None else f"Interrupted. {goes_on}."


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: With the message of an error, unless ``--debug`` asks for its traceback; with 130 on Ctrl-C.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = sys.argv[1:] if args is None else args
    formatwarning = warnings.formatwarning
    try:
        warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"  # where it comes from helps nobody here
        _run(args)
    except KeyboardInterrupt:
        if "--debug" in args:
            raise
        sys.stderr.write(f"\n{_interrupted(args)}\n")
        raise SystemExit(130) from None
    except Exception as error:
        if "--debug" in args:
            raise
        raise SystemExit(f"Error: {_sentence(error)}") from error
    finally:
        warnings.formatwarning = formatwarning
