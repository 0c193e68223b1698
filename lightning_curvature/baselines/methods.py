"""The methods that demos, reports and benchmarks compare, by the name that results give them."""

from collections.abc import Callable
from functools import partial

from lightning_curvature.baselines.random_basis import RandomBasisEditor
from lightning_curvature.baselines.svd import SVDEditor
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.weight_editor import WeightEditor

METHODS: dict[str, Callable[..., WeightEditor]] = {
    "kfac": CurvatureEditor,
    "activations": partial(CurvatureEditor, score="activations"),
    "svd": SVDEditor,
    "random": RandomBasisEditor,
}
"""What makes an editor of each method that is compared energy by energy; its first argument is the energy."""

CONTROL_LABELS = {
    "activations": "control: activations only (G = I)",
    "svd": "control: SVD truncation",
    "random": "control: random basis",
    "bsn": "rival: BalancedSubnet",
}
"""What a table calls the methods that the curvature edit is compared with."""

METHOD_LABELS = {"kfac": "K-FAC edit", **CONTROL_LABELS}
"""What a table calls each method."""
