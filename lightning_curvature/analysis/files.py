"""The analyses of a demo, in a JSON file."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_curvature.analysis.bands import BandComparison
from lightning_curvature.analysis.detection import Detection
from lightning_curvature.analysis.directions import DirectionUse
from lightning_curvature.storage.atomic import replacing

ANALYSIS_FILE = "analysis.json"


@dataclasses.dataclass(frozen=True)
class Analyses:
    """The analyses of a demo.

    Args:
        bands: How memorized and clean examples use the bands of each layer.
        detection: By the name of a set of other examples, how well scores tell memorized examples from them.
        directions: Which examples use the sharpest and the flattest directions of a layer.
        windows: By index, the text of each example in ``directions``; empty for images.
    """

    bands: tuple[BandComparison, ...] = ()
    detection: Mapping[str, Detection] = dataclasses.field(default_factory=dict)
    directions: tuple[DirectionUse, ...] = ()
    windows: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``analysis.json`` into a folder, atomically."""
        with replacing(Path(folder) / ANALYSIS_FILE) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Analyses":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it does not hold analyses.
        """
        path = Path(folder) / ANALYSIS_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                tuple(BandComparison(**_tuples(fields)) for fields in content["bands"]),
                {
                    name: Detection(**{key: _tuples(scores) for key, scores in fields.items()})
                    for name, fields in content["detection"].items()
                },
                tuple(DirectionUse(**_tuples(fields)) for fields in content["directions"]),
                {int(index): text for index, text in content["windows"].items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not the analyses of a demo ({error!r}). Run the demo again.") from error


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields read from JSON as a dataclass needs them: with tuples in place of lists."""
    return {key: _tuple(value) for key, value in fields.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
