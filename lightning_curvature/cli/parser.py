"""The command line: ``lightning-curvature``, also ``python -m lightning_curvature``.

Exit codes: 0 on success, 1 if the command fails, 2 if the command line is wrong, 130 if it is interrupted (Ctrl-C).
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, Literal, get_args, get_origin, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from lightning_curvature._checks import check_option
from lightning_curvature.cli.choices import LIGHTNING
from lightning_curvature.cli.commands import demos
from lightning_curvature.cli.commands.collect import collect, merge
from lightning_curvature.cli.commands.deltas import apply, revert
from lightning_curvature.cli.commands.detect import detect
from lightning_curvature.cli.commands.edit import edit
from lightning_curvature.cli.commands.evaluate import evaluate
from lightning_curvature.cli.commands.mine import mine
from lightning_curvature.cli.commands.output import Output
from lightning_curvature.cli.commands.show import inspect, report
from lightning_curvature.cli.commands.sweep import sweep

COMMANDS: dict[str, Callable[..., Output]] = {
    "demo digits": demos.digits,
    "demo text": demos.text,
    "demo pretrained": demos.pretrained,
    "collect": collect,
    "merge": merge,
    "edit": edit,
    "revert": revert,
    "apply": apply,
    "inspect": inspect,
    "mine": mine,
    "evaluate": evaluate,
    "sweep": sweep,
    "report": report,
    "detect": detect,
}
POSITIONAL = ("path", "paths")
"""Parameters that are positional arguments; the others are options."""
EXAMPLE_WORDS = {"device": ("auto", "cpu", "cuda", "cuda:N")}
"""By option, examples that the help shows in place of a full list of choices; the option takes other words, too."""


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions and examples, and shows defaults and choices instead of Python types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if not action.help:  # the list of commands
            return ""
        note = "required" if action.required else f"default: {action.default}"
        hides_default = any(
            action.default is value for value in (None, False, argparse.SUPPRESS)
        ) or dataclasses.is_dataclass(action.default)
        return f"{action.help}{f' ({note})' if action.required or not hides_default else ''}"


def make_parser() -> ArgumentParser:
    """Return the parser of all commands but those of LightningCLI."""
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
    demo_commands = demo.add_subcommands(dest="demo")
    for name, function in COMMANDS.items():
        words = name.split()
        group = demo_commands if words[0] == "demo" else subcommands
        doc = parse(function.__doc__ or "")
        group.add_subcommand(words[-1], command_parser(function), help=doc.short_description)
    return parser


def command_parser(function: Callable[..., Output]) -> ArgumentParser:
    """Return the parser of a command.

    Each parameter of the function is an option, with hyphens for underscores (those in ``POSITIONAL`` are arguments).
    The docstring of the function holds the help texts and the example.
    """
    doc = parse(function.__doc__ or "")
    (example,) = doc.examples
    parser = ArgumentParser(
        formatter_class=_HelpFormatter,
        description=doc.short_description,
        epilog=f"example:\n{textwrap.indent(example.description or '', '  ')}",
    )
    hints = get_type_hints(function)
    texts = {parameter.arg_name: parameter.description for parameter in doc.params}
    for name, parameter in signature(function).parameters.items():
        option = name if name in POSITIONAL else f"--{name.replace('_', '-')}"
        parser.add_argument(option, help=texts[name], **_argument(parameter, hints[name]))
    parser.add_argument("--json", action="store_true", help="Print JSON, for programs.")
    parser.add_argument("--debug", action="store_true", help="Show where an error comes from.")
    return parser


def _argument(parameter: Parameter, hint: Any) -> dict[str, Any]:
    """Return the arguments of ``add_argument`` for a parameter of a command, apart from its name and its help."""
    if hint is bool:
        return {"action": "store_true"}
    words = choices(hint) or EXAMPLE_WORDS.get(parameter.name, ())
    shown = f"{{{','.join(words)}}}"
    argument: dict[str, Any] = {"type": str | None, "metavar": shown} if words else {"type": hint}
    if item := _item(hint):
        metavar = (shown, "...") if words else parameter.name.upper()
        argument = {"type": item, "nargs": "+", "action": "extend", "metavar": metavar}
    if parameter.default is not Parameter.empty:
        argument["default"] = parameter.default
    elif parameter.name not in POSITIONAL:
        argument["required"] = True
    return argument


def choices(hint: Any) -> tuple[str, ...]:
    """Return the words that a type hint lists, or an empty tuple if it lists none."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((words for part in get_args(hint) if (words := choices(part))), ())


def _item(hint: Any) -> type | None:
    """Return the item type of a type hint such as ``list[str]`` or ``list[str] | None``; None if it has no list."""
    lists = [part for part in (hint, *get_args(hint)) if get_origin(part) is list]
    (item,) = get_args(lists[0]) if lists else (None,)
    return str if get_origin(item) is Literal else item


def _run(args: list[str]) -> None:
    """Run the command that a command line names, and print what it returns."""
    if args and args[0] in LIGHTNING:
        from lightning_curvature.cli.lightning import run

        run([argument for argument in args if argument != "--debug"])
        return
    parser = make_parser()
    parsed = parser.instantiate_classes(parser.parse_args(args))
    command, options = parsed.command, parsed[parsed.command]
    if command == "demo":
        command, options = f"demo {options.demo}", options[options.demo]
    values = {name: _flat(value) for name, value in vars(options).items() if name not in ("json", "debug")}
    function = COMMANDS[command]
    for name, hint in get_type_hints(function).items():
        if words := choices(hint):
            _check_words(name, values[name], words)
    output = function(**values)
    sys.stdout.write(json.dumps(output.data, indent=2, default=_jsonable) if options.json else output.text)
    sys.stdout.write("\n")


def _flat(value: Any) -> Any:
    """Return a list in which each JSON list of words is replaced by its words; return any other value unchanged."""
    if not isinstance(value, list):
        return value
    return [word for item in value for word in (json.loads(item) if str(item).startswith('["') else [item])]


def _check_words(name: str, value: Any, words: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if the value of an option, or an item of its list, is not among some words."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    for word in given:
        check_option(word, words, name)


def _jsonable(value: Any) -> Any:
    """Return the dict of a dataclass, and the text of any other value that JSON cannot hold."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else str(value)


def _sentence(error: Exception) -> str:
    """Return the message of an error, as the command line prints it."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or os.strerror(error.errno)
        return f"{reason}: {error.filename}" if error.filename is not None else f"{reason}."
    plain = isinstance(error, (ValueError, OSError, RuntimeError)) and str(error)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def _interrupted(args: list[str]) -> str:
    """Return what is printed when a command is interrupted."""
    how_to_continue = {
        "collect": "Run the same command again to continue from OUT.partial, as last saved",
        "sweep": "Run the same command again to make the edits that are not in sweep.csv yet",
    }.get(args[0] if args else "")
    return "Interrupted." if how_to_continue is None else f"Interrupted. {how_to_continue}."


def _show_logs() -> None:
    """Show what the package logs, unless the program around it does so.

    The root logger gets no handler: Lightning, which has its own, would say everything twice.
    """
    logger = logging.getLogger("lightning_curvature")
    if not logger.hasHandlers():
        logger.setLevel(logging.INFO)
        logger.addHandler(logging.StreamHandler())


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Raises:
        SystemExit: With the message of an error, or with 130 on Ctrl-C. With ``--debug`` the error itself is raised.
    """
    _show_logs()
    args = sys.argv[1:] if args is None else args
    formatwarning = warnings.formatwarning
    try:
        warnings.formatwarning = lambda message, *_: f"Warning: {message}\n"  # no file and line of the source
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
