"""Factors whose layers are spread over the processes of a run."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.kronecker import KroneckerFactors, digest_of
from lightning_curvature.factors.layer import LayerFactors


class ShardedFactors(KroneckerFactors):
    """Factors of which each process holds its part of the layers. It has the names of all, and the factors of its part.

    Args:
        part: Factors of the layers that this process holds.
        counts: Positions behind the inputs' factor of every layer, in the order of the layers.
        owners: Which process holds a layer.
        ranks: The processes.
        provenance: As in :class:`KroneckerFactors`.
    """

    def __init__(
        self,
        part: Mapping[str, LayerFactors],
        counts: Mapping[str, int],
        owners: Mapping[str, int],
        ranks: Ranks,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(part, provenance)
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
        return digest_of(self._of_all({name: layer.digest() for name, layer in self._layers.items()}))

    def tied_inputs(self) -> dict[str, str]:
        """Return, for each layer, the first layer of its process with the same A. A collective."""
        return self._of_all(KroneckerFactors(self._layers).tied_inputs())

    def _of_all(self, texts: Mapping[str, str]) -> dict[str, str]:
        """Return a text for every layer, given those for the layers of this process. A collective."""
        gathered: dict[str, str] = {}
        for part in self.ranks.gather(texts):
            gathered |= part
        return {name: gathered[name] for name in self}

    def gathered(self) -> KroneckerFactors:
        """Return all factors on the first process, on the CPU; what the others get is empty. A collective."""
        gathered, tied = dict[str, LayerFactors](), self.tied_inputs()
        for name in self:
            owner = self.owners[name]
            layer = self._layers.get(name)
            to_send, facts = dict[str, Tensor](), None
            if layer is not None:
                facts = layer.facts
                to_send = {kind: tensor for kind, tensor in layer.tensors.items() if kind != "A" or tied[name] == name}
            kinds, owner_facts = self.ranks.gather((list(to_send), facts))[owner]
            tensors = {kind: self.ranks.send(to_send.get(kind), owner) for kind in kinds}
            if self.ranks.rank == 0 and owner_facts is not None:
                on_cpu: dict[str, Any] = {kind: tensor.cpu() for kind, tensor in tensors.items()}
                if tied[name] != name:
                    on_cpu["A"] = gathered[tied[name]].A
                gathered[name] = LayerFactors(**(on_cpu | owner_facts))
        return KroneckerFactors(gathered, self.provenance)
