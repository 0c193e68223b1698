"""Files that every demo writes."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_curvature.editing.report import EditReport
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.storage.atomic import replacing


def write_edited(source: Path, editor: WeightEditor, factors: KroneckerFactors, target: Path) -> EditReport:
    """Write a copy of a Lightning checkpoint with edited weights and a record of the edit."""
    return editor.edit_checkpoint(source, factors, target, overwrite=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2))


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, of this package, of Lightning and PyTorch, and of further packages."""
    names = ("lightning_curvature", "torch", "lightning", "torchmetrics", *packages)
    return {"python": platform.python_version()} | {name: version(name) for name in names}
