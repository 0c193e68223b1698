"""Factors whose layers are spread over the processes of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.kronecker import KroneckerFactors, LayerFactors, digest_of


class ShardedFactors(KroneckerFactors):
    """Factors of which each process holds some layers; it has the names of all, and reads its own alone.

    Args:
        own: Layers of this process.
        counts: Positions behind the inputs' factor of every layer, in the order of the layers.
        owners: Which process holds a layer.
        ranks: The processes.
        provenance: As in :class:`KroneckerFactors`.
    """

    def __init__(
        self,
        own: Mapping[str, LayerFactors],
        counts: Mapping[str, int],
        owners: Mapping[str, int],
        ranks: Ranks,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(own, provenance)
        self.owners: Mapping[str, int] = dict(owners)
        self.ranks = ranks
        self._counts = dict(counts)

    def __getitem__(self, name: str) -> LayerFactors:
        if name in self._counts and name not in self._layers:
            raise RuntimeError(
                f"The factors of layer {name!r} are kept by process {self.owners[name]}, this is process "
                f"{self.ranks.rank} (shard_factors=True). Read them from the factor file beside a checkpoint."
            )
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, name: object) -> bool:
        return name in self._counts

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)}, here {list(self._layers)})"

    def counts(self) -> dict[str, int]:
        """Return the positions behind the inputs' factor of each layer."""
        return dict(self._counts)

    def digest(self) -> str:
        """Return the digest that the same factors have on one process. A collective."""
        told: dict[str, str] = {}
        for part in self.ranks.gather({name: layer.digest() for name, layer in self._layers.items()}):
            told |= part
        return digest_of({name: told[name] for name in self})

    def tied_inputs(self) -> dict[str, str]:
        """Return, for each layer, the first one of its process that has the same A. A collective."""
        told: dict[str, str] = {}
        for part in self.ranks.gather(KroneckerFactors(self._layers).tied_inputs()):
            told |= part
        return {name: told[name] for name in self}

    def gathered(self) -> KroneckerFactors:
        """Return all factors on the first process, on the CPU; what the others get is empty. A collective."""
        gathered, tied = dict[str, LayerFactors](), self.tied_inputs()
        for name in self:
            owner = self.owners[name]
            layer = self._layers.get(name)
            own, told = dict[str, Tensor](), None
            if layer is not None:
                own, told = layer.tensors, layer.facts
                own = {key: tensor for key, tensor in own.items() if key != "A" or tied[name] == name}
            keys, numbers = self.ranks.gather((list(own), told))[owner]
            tensors = {key: self.ranks.send(own.get(key), owner) for key in keys}
            if self.ranks.rank == 0 and numbers is not None:
                on_cpu: dict[str, Any] = {key: tensor.cpu() for key, tensor in tensors.items()}
                if tied[name] != name:
                    on_cpu["A"] = gathered[tied[name]].A
                gathered[name] = LayerFactors(**(on_cpu | numbers))
        return KroneckerFactors(gathered, self.provenance)
