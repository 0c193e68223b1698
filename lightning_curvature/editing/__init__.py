"""From factors to new weights: in a module, in a state dict, or in a saved checkpoint."""

from lightning_curvature.editing.base import DEFAULT_ENERGY, Editor
from lightning_curvature.editing.bulk import BulkStepEditor, add_margins
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.projection import Projection
from lightning_curvature.editing.report import EditReport, LayerEdit
from lightning_curvature.editing.weight_editor import WeightEditor

__all__ = [
    "DEFAULT_ENERGY",
    "BulkStepEditor",
    "CurvatureEditor",
    "EditReport",
    "Editor",
    "LayerEdit",
    "Projection",
    "WeightEditor",
    "add_margins",
]
