"""What an edited checkpoint says about its edit, in each format, and how it is checked and told."""

import json
from collections.abc import Mapping
from typing import Any

from lightning_curvature._checks import listing
from lightning_curvature.storage.tree import COPY_AGAIN


def check_facts(facts: Any, what: str) -> dict[str, Any]:
    """Return what an edited checkpoint says about its edit, if it can be shown and passed on.

    Args:
        facts: JSON values, as :meth:`WeightEditor.facts` returns them.
        what: The file and what of it this is, for errors.

    Raises:
        ValueError: If it is no object of JSON values, or what it says of layers and their origin are none.
    """
    try:
        json.dumps(facts, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} holds more than JSON ({error}). {COPY_AGAIN}") from error
    fits = isinstance(facts, dict) and all(isinstance(facts.get(key, {}), dict) for key in ("layers", "provenance"))
    if not fits or not all(isinstance(layer, dict) for layer in facts.get("layers", {}).values()):
        raise ValueError(f"{what} does not say what was edited: it has other fields than an edit writes. {COPY_AGAIN}")
    return dict(facts)


ENTRY = "lightning_curvature"
"""Entry of a Lightning checkpoint that says what was edited."""

METADATA_ENTRY = "lightning_curvature.edit"
"""Metadata entry of a safetensors file that says what was edited, as JSON."""


def edited_note(checkpoint: Mapping[str, Any]) -> str | None:
    """Return a sentence that says what was edited in the content of a Lightning checkpoint; None if nothing was.

    Args:
        checkpoint: What ``torch.load`` returns of it, or a hook of Lightning is given.
    """
    found = checkpoint.get(ENTRY)
    if not isinstance(found, dict):
        return None
    layers = found.get("layers") if isinstance(found.get("layers"), dict) else {}
    return (
        f"This checkpoint is an edited copy (method {found.get('method')}, layers {listing(layers or {}, 3)}): its "
        "weights are not those that training left, while the states of its optimizers are. Go on from the checkpoint "
        "beside it whose name lacks the mark, such as NAME.ckpt of NAME-edited.ckpt, unless you mean the edited one."
    )
