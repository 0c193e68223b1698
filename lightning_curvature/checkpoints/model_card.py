"""The model card of a Hugging Face folder, with a section that says what was edited."""

import re
from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

CARD = "README.md"
AS_IT_IS = ("utf-8", "surrogateescape")
"""Encoding of a card, and how errors are handled: bytes that are no UTF-8 survive."""
_BEGIN, _END = "<!-- lightning_curvature: begin -->", "<!-- lightning_curvature: end -->"
_SECTION = re.compile(rf"\n\n{_BEGIN}.*?{_END}\n", re.DOTALL)


def without_section(card: bytes) -> bytes:
    """Return a model card without the section that an edit wrote; every other byte stays."""
    return _SECTION.sub("", card.decode(*AS_IT_IS)).encode(*AS_IT_IS)


def card_section(facts: Mapping[str, Any]) -> bytes:
    """Return the section of a model card that says what was edited, as Markdown."""
    unknown = "not known"
    rows = [
        [name, *(layer.get(key, unknown) for key in ("energy", "positions"))]
        for name, layer in facts.get("layers", {}).items()
    ]
    table = tabulate(rows, ["layer", "energy", "positions"], tablefmt="github", disable_numparse=True)
    return (
        f"\n\n{_BEGIN}\n## Edited weights\n\n"
        f"Weights of this model were edited with {facts.get('package', unknown)} (method "
        f"{facts.get('method', unknown)}, "
        "arXiv:2510.24256), so that it recites less of its training data. Facts that it knows by heart can suffer, "
        "too.\n\n"
        f"{table}\n\n"
        f"- Fisher: {facts.get('provenance', {}).get('fisher', unknown)}\n"
        f"- SHA-256 of the unedited weights: `{facts.get('source', unknown)}`\n"
        f"- SHA-256 of the K-FAC factors: `{facts.get('factors', unknown)}`\n{_END}\n"
    ).encode(*AS_IT_IS)
