r"""The supervised bulk step: for users who *have* a list of what a model recites.

The margin of a recited token is its logit minus the largest other one. The gradient of the summed margins with respect
to a weight is projected on the *bulk* of the curvature basis, its flattest directions, and the weight makes one step
against it. The margins fall, and the loss on other data hardly changes, since it is flat in these directions.

Source: the idea is github.com/smarter/memorization_kfac (theory).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_curvature._checks import check_energy
from lightning_curvature.editing.curvature import CurvatureEditor
from lightning_curvature.editing.projection import Projection
from lightning_curvature.editing.report import EditReport
from lightning_curvature.factors.basis import coefficients
from lightning_curvature.factors.decomposition import moderate
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.layers.kinds import as_matrix, is_conv1d
from lightning_curvature.layers.modules import find_layer

Batch = TypeVar("Batch")


def add_margins(
    module: nn.Module, factors: KroneckerFactors, batches: Iterable[Batch], margins: Callable[[Batch], Tensor]
) -> KroneckerFactors:
    """Return factors with the gradient of the summed margins of some examples, for :class:`BulkStepEditor`.

    Args:
        module: The network, in eval mode; weights and ``.grad`` stay as they are.
        factors: Its factors.
        batches: Batches of what the network recites, in any form that ``margins`` takes.
        margins: Returns the margins of a batch, with their graph: for each token (or image) that should be forgotten
            the logit of what was memorized minus the largest other one, see
            :func:`lightning_curvature.metrics.functional.margins.logit_margins`.

    Returns:
        New factors, with the gradients as their ``margins``.

    Raises:
        ValueError: If there is no batch, or the factors do not fit the module.
    """
    layers = {name: find_layer(module, name) for name in factors}
    weights = [layer.weight for layer in layers.values()]
    frozen = [weight for weight in weights if not weight.requires_grad]
    sums: list[Tensor] | None = None
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                gradients = torch.autograd.grad(margins(batch).sum(), weights)
            if sums is None:
                sums = [gradient.double() for gradient in gradients]
            else:
                sums = [total + gradient for total, gradient in zip(sums, gradients, strict=True)]
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
    if sums is None:
        raise ValueError("There is nothing to forget: no batch was given.")
    with_margins = {}
    for (name, layer), gradient in zip(layers.items(), sums, strict=True):
        matrix = as_matrix(gradient, is_conv1d(layer)).to(factors[name].A.dtype)
        with_margins[name] = dataclasses.replace(factors[name], margins=matrix)
    return KroneckerFactors(with_margins, factors.provenance)


class BulkStepEditor(CurvatureEditor):
    """One step against the margins of recited examples, in the flattest directions of the curvature basis.

    The factors must hold the gradient of the margins, see :func:`add_margins`. With ``energy`` below 1 the result is
    edited as by a :class:`CurvatureEditor`, which also removes what was not on the list.

    Args:
        strength: Norm of the step, relative to that of the weight.
        energy: As in :class:`CurvatureEditor`, for the edit of the result; 1.0, the default, leaves that edit out.
        layers: As in :class:`CurvatureEditor`.
        score: As in :class:`CurvatureEditor`.
        soft: As in :class:`CurvatureEditor`.
        bulk: Share of the directions of each side, the flattest, in which the step is made.
        min_positions: As in :class:`CurvatureEditor`.

    Raises:
        TypeError: If ``strength`` is no number.
        ValueError: If ``strength`` is negative, or ``energy`` or ``bulk`` lies outside (0, 1].
    """

    keeps_at_full_energy = False

    def __init__(
        self,
        strength: float = 0.3,
        energy: float | Mapping[str, float] = 1.0,
        layers: list[str] | None = None,
        score: str = "kfac",
        soft: bool = False,
        bulk: float = 0.9,
        min_positions: int | None = None,
    ) -> None:
        super().__init__(energy, layers, score, soft, min_positions=min_positions)
        if isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise TypeError(f"strength must be a number, found {strength!r}.")
        if not strength >= 0:
            raise ValueError(f"strength must not be negative, found {strength!r}.")
        self.strength = float(strength)
        self.bulk = check_energy(bulk, "bulk")
        self.method = f"bulk step, {self.method}"

    def project(self, weight: Tensor, factors: LayerFactors, energy: float) -> Projection:
        """Return the weight after the step; if ``energy`` is below 1, the high-curvature part of that weight."""
        if factors.margins is None:
            raise ValueError(
                "a bulk step needs the gradient of margins, which the factors do not hold. Add it with "
                "lightning_curvature.editing.add_margins, over examples that the model recites."
            )
        basis = factors.basis
        matrix = weight.to(basis.U_A)
        steep_rows, steep_columns = (round((1 - self.bulk) * side) for side in matrix.shape)
        step = coefficients(moderate(factors.margins.double())[0], basis)
        step[:steep_rows] = 0
        step[:, :steep_columns] = 0
        if not float(step.norm()) > 0.0:
            raise ValueError("the gradient of the margins has no part in the flat directions, so there is no step.")
        stepped = matrix - self.strength * matrix.norm() / step.norm() * (basis.U_G @ step @ basis.U_A.T)
        if energy == 1.0:
            return Projection(stepped.to(weight), weight.numel(), 1.0)
        projection = super().project(stepped, factors, energy)
        return dataclasses.replace(projection, weight=projection.weight.to(weight))

    def facts(self, factors: KroneckerFactors, source: str, report: EditReport | None = None) -> dict[str, Any]:
        """Return what an edited checkpoint says about itself, as JSON values."""
        return {**super().facts(factors, source, report), "strength": self.strength, "bulk": self.bulk}
