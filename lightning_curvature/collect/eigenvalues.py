r"""Corrected eigenvalues of the curvature basis (EK-FAC): a second pass over the data.

K-FAC assumes that inputs and gradients are independent: then the curvature of the direction ``u_i v_j^T`` is its mass
``lam_i mu_j``. The second pass measures this curvature: ``E[(u_i^T g)^2 (v_j^T a)^2]``, the diagonal of the Fisher in
that basis.

Source: George et al. 2018, arXiv:1806.03884.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.moments import SecondMoment
from lightning_curvature.collect.passes import run_collector
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.collect.tied_inputs import sums_over
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.factors.sharded import ShardedFactors
from lightning_curvature.recording.options import CollectorOptions

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
        """Do nothing: :meth:`add_gradients` takes inputs and gradients together."""

    @override
    def add_gradients(self, inputs: Tensor, passes: Sequence[Tensor], scale: float, seen: int, losses: float) -> None:
        """Add positions; arguments as in :meth:`LayerSums.add_gradients`."""
        basis = self.layer.basis
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        along_inputs = (inputs.to(dtype) @ basis.U_A.to(inputs.device, dtype)).square()
        for gradients in passes:
            along_outputs = (gradients.to(dtype) @ basis.U_G.to(inputs.device, dtype)).square() * scale
            self.total += (along_outputs.T @ along_inputs).to(self.total.device)
        self.count += len(inputs)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)`` of the weight matrix."""
        return self.layer.shape

    @override
    def merge_(self, other: LayerSums, with_inputs: bool = True) -> None:
        """Add the sums of other positions; ``with_inputs`` has no effect, as there is no moment of inputs alone."""
        if not isinstance(other, EigenvalueSums):
            raise TypeError(f"Sums of eigenvalues merge only with sums of eigenvalues, found {type(other).__name__}.")
        self.total += other.total.to(self.total.device)
        self.count += other.count

    @override
    def over(self, ranks: Ranks, to: int | None = None, inputs: SecondMoment | None = None) -> LayerSums:
        """Return the sums over all processes, as :meth:`LayerSums.over`. A collective."""
        if ranks.size == 1:
            return self
        merged = EigenvalueSums(self.layer, torch.device("meta"))
        merged.count = int(ranks.sum(torch.tensor(self.count, device="cpu")))
        merged.total = ranks.sum(self.total, to)
        return merged

    def part(self, ranks: Ranks) -> LayerSums:
        """Return this process's part of sums over all processes. The parts of all processes add up to these sums."""
        part = EigenvalueSums(self.layer, torch.device("meta"))
        part.count = ranks.part(self.count)
        part.total = self.total * (part.count / max(self.count, 1))
        return part

    def move(self, device: torch.device) -> None:
        """Move the sums to a device."""
        self.total = self.total.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that :meth:`load_state_dict` needs, as tensors and primitives."""
        return {**super().state_dict(), "eigenvalues": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the sums from what :meth:`state_dict` returned, on the device of its tensors."""
        if "eigenvalues" not in state:
            raise ValueError("This state is of a collection of factors, which holds no eigenvalues. Collect anew.")
        super().load_state_dict({key: value for key, value in state.items() if key != "eigenvalues"})
        self.total, self.count = state["eigenvalues"], state["count"]

    def factors(self) -> LayerFactors:
        """Return the factors with the corrected eigenvalues."""
        return dataclasses.replace(self.layer, eigenvalues=(self.total / max(self.count, 1)).to(self.layer.A.dtype))


class EigenvalueCollector(Collector):
    """Collects the corrected eigenvalues of all layers that the given factors describe.

    Args:
        module: The network.
        factors: Its factors.
        options: What is collected; ``layers`` must be the layers of ``factors``.
        ranks: The processes of the run; by default this one alone.
        shard: Spread the sums over the processes.

    Raises:
        ValueError: If the factors are spread over several processes.
    """

    def __init__(
        self,
        module: nn.Module,
        factors: KroneckerFactors,
        options: CollectorOptions,
        *,
        ranks: Ranks | None = None,
        shard: bool = False,
    ) -> None:
        if factors.owners is not None:
            raise ValueError(
                "Each process needs the eigenvectors of all layers, but these factors are spread over several. Load "
                "them from their file on each process (KroneckerFactors.load). shard=True spreads only the sums."
            )
        super().__init__(module, options, ranks=ranks, shard=shard)
        self.uncorrected = factors
        self.provenance |= factors.provenance

    @override
    def _new_sums(self, name: str, kind: LayerKind, home: torch.device) -> LayerSums:
        return EigenvalueSums(self.uncorrected[name], home)

    def finish(self) -> KroneckerFactors:
        """Return the factors with the eigenvalues that all processes measured, and drop the sums. A collective."""
        ranks, owners, counts = self.ranks, self.owners, self.uncorrected.counts()
        if ranks.size == 1:
            return super().finish()
        if owners is not None:
            return ShardedFactors(self.accumulator.take(), counts, owners, ranks, self._full_provenance)
        kinds = {name: sums.kind for name, sums in self.sums.items()}
        merged = dict(sums_over(ranks, kinds, self.sums.__getitem__, new=self._new_sums))
        self.reset()
        return KroneckerFactors(
            {name: merged[name].factors() for name in counts if name in merged}, self._full_provenance
        )


def correct_eigenvalues(
    module: nn.Module,
    factors: KroneckerFactors,
    batches: Iterable[Batch],
    step: Callable[[Batch], Any],
    *,
    ranks: Ranks | None = None,
    shard: bool = False,
    **options: Any,
) -> KroneckerFactors:
    """Return factors with measured eigenvalues, for ``CurvatureEditor(score="ekfac")``.

    Args:
        module: The network. No training runs during the pass.
        factors: Its factors.
        batches: The data that the factors were collected on.
        step: Computes the loss of a batch.
        ranks: The processes, if several collect together, each from its own data.
        shard: With several processes, let each process keep the eigenvalues of only some layers.
        **options: Arguments of :class:`~lightning_curvature.recording.options.CollectorOptions`, except ``layers``.

    Raises:
        ValueError: If the factors are spread over several processes.
        RuntimeError: If no batch could be used.
    """
    settings = CollectorOptions(layers=list(factors), **options)
    return run_collector(EigenvalueCollector(module, factors, settings, ranks=ranks, shard=shard), batches, step)
