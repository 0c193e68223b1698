"""What a page consists of, as its template reads it."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

Block = dict[str, Any]


def paragraph(text: str) -> Block:
    """Return a paragraph."""
    return {"kind": "text", "text": text}


def details(title: str, blocks: Sequence[Block]) -> Block:
    """Return blocks that are hidden behind a title until it is clicked."""
    return {"kind": "details", "title": title, "blocks": list(blocks)}


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str, strong: Sequence[int] = ()) -> Block:
    """Return a table; rows at the places in ``strong`` are bold."""
    return {"kind": "table", "headers": headers, "rows": rows, "caption": caption, "strong": list(strong)}


def picture(figure: Figure, caption: str) -> Block:
    """Return a figure as SVG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "lightning_curvature"}):
        figure.savefig(buffer, format="svg", dpi=110, metadata={"Date": None})
    return _source(buffer.getvalue(), "svg+xml", caption)


def png(path: Path, caption: str) -> Block:
    """Return a PNG file."""
    return _source(path.read_bytes(), "png", caption)


def _source(content: bytes, kind: str, caption: str) -> Block:
    return {
        "kind": "picture",
        "caption": caption,
        "source": f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
    }
