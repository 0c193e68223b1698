"""Writes ``docs/commands.md``, the reference of the command line, from the parser itself.

python docs/_sphinx/commands.py
"""

import argparse
from pathlib import Path

from docstring_parser import parse

from lightning_curvature.cli.parser import COMMANDS, command_parser

PAGE = Path(__file__).parents[1] / "commands.md"
HEAD = """# Command line

`lightning-curvature COMMAND --help` prints what stands here. Every command takes `--json` (print JSON, for programs)
and `--debug` (show where an error comes from). Exit codes: 0 on success, 1 if the command fails, 2 if the command line
is wrong, 130 if it is interrupted. `fit`, `validate` and `test` take the arguments of LightningCLI, see
[configurations](tutorial.md#configurations).

<!-- written by docs/_sphinx/commands.py -->
"""
COMMON = ("help", "json", "debug")


def render() -> str:
    """Return the page."""
    parts = [HEAD]
    for name, function in COMMANDS.items():
        parser = command_parser(function)
        doc = parse(function.__doc__ or "")
        parts += [f"## {name}\n", f"{doc.short_description}\n", f"```bash\n{doc.examples[0].description}\n```\n"]
        if doc.long_description:
            parts.append(f"{doc.long_description}\n")
        rows = [_row(parser, action) for action in parser._actions if action.dest not in COMMON]
        parts += ["| | |\n|---|---|", *rows, ""]
    return "\n".join(parts)


def _row(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    words = formatter._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
    title = f"{action.option_strings[0]} {words}".strip() if action.option_strings else words
    text = " ".join((formatter._get_help_string(action) or "").split())
    return f"| `{title}` | {text} |".replace("\n", " ")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
