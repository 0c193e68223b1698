r"""Corrected eigenvalues of the curvature basis (EK-FAC): a second pass over the data.

K-FAC takes the mass of the direction ``u_i v_j^T`` for the product ``lam_i mu_j``, as if inputs and gradients were
independent. The second pass measures it: ``E[(u_i^T g)^2 (v_j^T a)^2]``, the diagonal of the Fisher in that basis.

Source: George et al. 2018, arXiv:1806.03884.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_curvature.collect import run_collector
from lightning_curvature.collector import Collector
from lightning_curvature.factors import KroneckerFactors, LayerFactors
from lightning_curvature.sums import LayerKind, LayerSums

Batch = TypeVar("Batch")


class EigenvalueSums(LayerSums):
    """Running sums of the corrected eigenvalues of one layer.

    Args:
        layer: Its factors.
        device: Where the sums live.
    """

    def __init__(self, layer: LayerFactors, device: torch.device) -> None:
        super().__init__(0, 0, device, layer.transposed)
        self.layer = layer
        self.total = torch.zeros(layer.shape, dtype=torch.float64, device=device)
        self.count = 0

    def add_inputs(self, inputs: Tensor) -> None:
        """Do nothing: inputs count with the gradients."""

    def add_gradients(self, inputs: Tensor, passes: Sequence[Tensor], scale: float, seen: int) -> None:  # noqa: ARG002
        """Add positions, as :meth:`LayerSums.add_gradients`."""
        basis = self.layer.basis
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        along_inputs = (inputs.to(dtype) @ basis.U_A.to(inputs.device, dtype)).square()
        for gradients in passes:
            along_outputs = (gradients.to(dtype) @ basis.U_G.to(inputs.device, dtype)).square() * scale
            self.total += (along_outputs.T @ along_inputs).to(self.total.device)
        self.count += len(inputs)

    def factors(self) -> LayerFactors:
        """Return the factors with the corrected eigenvalues."""
        return dataclasses.replace(self.layer, eigenvalues=(self.total / max(self.count, 1)).to(self.layer.A.dtype))


class _EigenvalueCollector(Collector):
    def __init__(self, module: nn.Module, factors: KroneckerFactors, **options: Any) -> None:
        super().__init__(module, list(factors), **options)
        self.source = factors
        self.provenance |= factors.provenance

    def _new_sums(self, name: str, kind: LayerKind, home: torch.device) -> LayerSums:  # noqa: ARG002
        return EigenvalueSums(self.source[name], home)


def correct_eigenvalues(
    module: nn.Module,
    factors: KroneckerFactors,
    batches: Iterable[Batch],
    step: Callable[[Batch], Tensor],
    **options: Any,
) -> KroneckerFactors:
    """Return factors with measured eigenvalues, for ``CurvatureEditor(score="ekfac")``.

    Args:
        module: The network, frozen.
        factors: Its factors.
        batches: Data, those of the factors.
        step: Computes the loss of a batch.
        **options: Arguments of :class:`lightning_curvature.collector.Collector` but ``layers``.

    Raises:
        RuntimeError: If no batch could be used.
    """
    return run_collector(_EigenvalueCollector(module, factors, **options), batches, step)
