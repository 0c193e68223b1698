"""Real English that every Python installation carries: reference documentation, docstrings and comments.

Three kinds of text, each with its own style:

- ``reference``: the language reference behind ``help()`` (``pydoc_data.topics``), one document per topic;
- ``docstrings``: docstrings of the standard library, one document per module;
- ``comments``: blocks of consecutive comment lines in the sources of the standard library, one document per block.
"""

import ast
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
MIN_PARAGRAPH = 20
MIN_COMMENT = 240
"""Characters below which a paragraph, or a block of comments, is left out."""


def read_texts() -> dict[str, list[str]]:
    """Return documents by kind; no paragraph occurs twice.

    Raises:
        RuntimeError: If the sources of the standard library are not installed.
    """
    seen: set[str] = set()
    library = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in sorted(library.rglob("*.py")) if not _LEFT_OUT & set(path.relative_to(library).parts)]
    texts: dict[str, list[str]] = {"reference": [], "docstrings": [], "comments": []}
    for _, topic in sorted(pydoc_data.topics.topics.items()):
        texts["reference"] += _document(topic.split("\n\n"), seen)
    for path in sources:
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, ValueError, OSError):
            continue  # some files of the standard library are broken on purpose
        texts["docstrings"] += _document((p for text in _docstrings(tree) for p in text.split("\n\n")), seen)
        for block in _comments(source):
            texts["comments"] += _document([block], seen)
    if sum(map(len, texts["docstrings"])) < 500_000:
        raise RuntimeError(
            f"{library} holds too little source text for the demo ({len(sources)} files). Use a Python with its "
            "complete standard library (on Debian: apt install libpython3-stdlib)."
        )
    return texts


def _document(paragraphs: Iterable[str], seen: set[str]) -> list[str]:
    """Return a document of the paragraphs that were not seen before, as a list of one text, or of none."""
    kept = []
    for paragraph in paragraphs:
        key = " ".join(paragraph.split())
        if len(key) >= MIN_PARAGRAPH and key not in seen:
            seen.add(key)
            kept.append(paragraph.strip("\n"))
    return ["\n\n".join(kept)] if kept else []


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _comments(source: str) -> Iterator[str]:
    """Yield blocks of lines that hold nothing but a comment, without their marks."""
    block: list[str] = []
    for line in (line.strip() for line in source.splitlines()):
        if line.startswith("#"):
            block.append(line.lstrip("#").strip())
        else:
            yield from _long(block)
            block = []
    yield from _long(block)


def _long(block: list[str]) -> Iterator[str]:
    text = "\n".join(block).strip()
    if len(text) >= MIN_COMMENT:
        yield text
