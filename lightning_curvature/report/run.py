"""What the folder of a run holds."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_curvature.analysis.files import ANALYSIS_FILE, Analyses
from lightning_curvature.factors.files import is_factor_file
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.report.inspection import describe

Report = Mapping[str, Any]
"""Content of ``report.json``."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """What the folder of a run holds, as far as a page shows it.

    Args:
        folder: The folder.
        report: Content of ``report.json``; empty if there is none.
        factor_files: Factor files, of which no two hold the same factors.
        edited: What :func:`~lightning_curvature.report.inspection.describe` says of each edited checkpoint.
        unread: Why some checkpoints could not be read, a sentence for each.
        analyses: Content of ``analysis.json``; empty if there is none.
    """

    folder: Path
    report: Report
    factor_files: Sequence[Path]
    edited: Sequence[Mapping[str, Any]]
    unread: Sequence[str]
    analyses: Analyses


def read_run(folder: Path) -> RunFolder:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing of a run is in it.
        ValueError: If a file does not hold what its name says.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder. Name the folder that a run wrote to.")
    report = _read_report(folder / "report.json")
    factor_files = [path for path in sorted(folder.glob("*.safetensors")) if is_factor_file(path)]
    distinct = {KroneckerFactors.open(path).digest(): path for path in reversed(factor_files)}
    edited, unread = [], []
    for path in sorted([*folder.glob("*.ckpt"), *(set(folder.glob("*.safetensors")) - set(factor_files))]):
        try:
            facts = describe(path)
        except ValueError as error:  # it may need classes that nobody allowed, and the rest can be shown without it
            unread.append(str(error))
        else:
            edited += [facts] if facts.get("edit") else []
    if not (report or factor_files or edited):
        raise FileNotFoundError(
            f"{folder} holds no report.json, no factors (*.safetensors) and no edited checkpoint (*.ckpt): nothing to "
            "show. Name the folder that a run wrote to."
        )
    analyses = Analyses.load(folder) if (folder / ANALYSIS_FILE).exists() else Analyses()
    return RunFolder(folder, report, [*distinct.values()], edited, unread, analyses)


def _read_report(path: Path) -> Report:
    if not path.exists():
        return {}
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
        is_report = isinstance(report["before"], dict) and isinstance(report["after"], dict)
    except (ValueError, KeyError, TypeError):
        is_report = False
    if not is_report:
        raise ValueError(f"{path}: not the report of a run; expected an object with before and after.")
    return report
