"""A control of every edit of an update: going back towards the weights that the model was fine-tuned from."""

from torch import Tensor
from typing_extensions import override

from lightning_curvature.editing.projection import Projection
from lightning_curvature.editing.report import EditReport
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.layer import LayerFactors


class InterpolationEditor(WeightEditor):
    """Keeps the share ``energy`` of the update of all weights: ``W' = W0 + energy (W - W0)``.

    It needs a reference, see :meth:`~lightning_curvature.editing.base.Editor.based_on`. Weights without factors keep
    the same share (on the average, if energies are given by layer); the factors only say how layers are named.

    Source: Wortsman et al. 2022, arXiv:2109.01903 (WiSE-FT).

    Args:
        energy: Share of the update to keep, in (0, 1], or a dict as in :class:`~lightning_curvature.CurvatureEditor`.
        layers: As in :class:`~lightning_curvature.CurvatureEditor`.

    Raises:
        ValueError: When it edits without a reference.
    """

    reads_factors = False
    method = "interpolation"

    @override
    def share_of_others(self, report: EditReport) -> float:
        return self.scale if report.update_kept is None else report.update_kept

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the share of an update."""
        if self.reference is None:
            raise ValueError("interpolation needs the weights that the model was fine-tuned from: reference=.")
        return Projection(energy * weight, weight.numel(), energy)
