"""What an edited checkpoint says about its edit, in each format, and how it is checked and told."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_curvature._checks import listing
from lightning_curvature.storage.outputs import NOTE
from lightning_curvature.storage.tree import COPY_AGAIN, parse_json

ENTRY = "lightning_curvature"
"""Entry of a Lightning checkpoint that says what was edited."""

METADATA_ENTRY = "lightning_curvature.edit"
"""Metadata entry of a safetensors file that says what was edited, as JSON."""


def check_facts(facts: Any, what: str) -> dict[str, Any]:
    """Return what an edited checkpoint says about its edit, if it can be shown and passed on.

    Args:
        facts: JSON values, as :meth:`WeightEditor.facts` returns them.
        what: The file and what of it this is, for errors.

    Raises:
        ValueError: If the facts are no object of JSON values, or their entries on layers and provenance are no objects.
    """
    try:
        json.dumps(facts, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} holds more than JSON ({error}). {COPY_AGAIN}") from error
    fits = isinstance(facts, dict) and all(isinstance(facts.get(key, {}), dict) for key in ("layers", "provenance"))
    if not fits or not all(isinstance(layer, dict) for layer in facts.get("layers", {}).values()):
        raise ValueError(f"{what} does not say what was edited: it has other fields than an edit writes. {COPY_AGAIN}")
    return dict(facts)


def read_note(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return what the note in a Hugging Face folder says about an edit; None if there is no note.

    Raises:
        ValueError: If the note is damaged.
    """
    note = Path(folder) / NOTE
    return check_facts(parse_json(note.read_bytes(), f"{note}"), f"{note}") if note.is_file() else None


def checkpoint_note(content: Mapping[str, Any]) -> str | None:
    """Return a sentence for somebody who trains on from an edited Lightning checkpoint; None if it was not edited.

    Args:
        content: The content of the checkpoint, as ``torch.load`` returns it and as hooks of Lightning get it.
    """
    facts = content.get(ENTRY)
    if not isinstance(facts, dict):
        return None
    return (
        f"This checkpoint is {_edited_copy(facts)}: its weights are not those that training left, while the states of "
        "its optimizers are. Go on from the checkpoint beside it whose name lacks the mark, such as NAME.ckpt of "
        "NAME-edited.ckpt, unless you mean the edited one."
    )


def folder_note(folder: str | os.PathLike[str]) -> str | None:
    """Return a sentence for somebody who loads a model from an edited Hugging Face folder; None if it was not edited.

    Raises:
        ValueError: If what the folder says of its edit is damaged.
    """
    facts = read_note(folder)
    return None if facts is None else f"The model in {folder} is {_edited_copy(facts)}."


def _edited_copy(facts: Mapping[str, Any]) -> str:
    layers = facts.get("layers")
    names = listing(layers, 3) if isinstance(layers, dict) else ""
    return f"an edited copy (method {facts.get('method')}, layers {names})"
