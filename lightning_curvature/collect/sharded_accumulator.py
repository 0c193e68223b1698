"""Running sums that are spread over processes: each keeps those of its own layers, of the data of all."""

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch

from lightning_curvature.collect.accumulator import Accumulator, Home, NewSums
from lightning_curvature.collect.moments import SecondMoment
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.collect.tied_inputs import sums_over, tied_by_all
from lightning_curvature.distributed import Ranks
from lightning_curvature.recording.rows import CallRows


class ShardedAccumulator(Accumulator):
    """Running sums of the layers that this process owns, of the data of all processes.

    The batches of all processes are added up as they come: :meth:`add` is a collective, and a process that has no
    batch left takes part with :meth:`drain`.

    Args:
        new_sums: Makes the sums of a layer.
        home: Tells where they live.
        positions: Which positions count.
        ranks: The processes of the run.
        owners: Which process keeps the sums of a layer, by name.
    """

    owners: Mapping[str, int]

    def __init__(self, new_sums: NewSums, home: Home, positions: str, ranks: Ranks, owners: Mapping[str, int]) -> None:
        super().__init__(new_sums, home, positions, ranks)
        self.owners = owners
        self._num_positions: dict[str, int] = {}

    @property
    def num_positions(self) -> dict[str, int]:
        """Positions of each layer since the last reset, over all processes."""
        return dict(self._num_positions)

    def reset(self) -> None:
        """Start to sum anew."""
        super().reset()
        self._num_positions = {}

    @property
    def _exchanging(self) -> list[torch.device]:
        return [self.ranks.device]

    def _add_groups(self, groups: Sequence[Mapping[str, Sequence[CallRows]]], kinds: Mapping[str, LayerKind]) -> None:
        batch = _BatchSums([part for group in groups for part in self._by_owner(group)], kinds, self._sums_of)
        self._exchange(batch.kinds, batch.take, batch.tied_inputs)

    def _by_owner(self, group: Mapping[str, Sequence[CallRows]]) -> list[dict[str, Sequence[CallRows]]]:
        """Cut a group of layers that read the same inputs into those of one owner each."""
        parts = dict[int, dict[str, Sequence[CallRows]]]()
        for name, calls in group.items():
            parts.setdefault(self.owners[name], {})[name] = calls
        return list(parts.values())

    def _sums_of(self, group: Mapping[str, Sequence[CallRows]], kinds: Mapping[str, LayerKind]) -> dict[str, LayerSums]:
        """Return the sums of one batch of layers that read the same inputs."""
        sums = {name: self._new_sums(name, kinds[name], self.ranks.device) for name in group}
        first = next(iter(sums.values()))
        for layer in sums.values():
            layer.tie_inputs(first.inputs)
        if self.ranks.is_counted:  # a process that is not counted takes part, and adds nothing
            self._add_group(group, sums)
        return sums

    def drain(self) -> None:
        """Take part in what other processes still add, until all are done. A collective."""
        nothing: dict[str, LayerSums] = {}
        with self._side.beside([], self._exchanging):
            while self._exchange({}, nothing.__getitem__, None):
                pass

    def _exchange(
        self, kinds: Mapping[str, LayerKind], get: Callable[[str], LayerSums], tied: Mapping[str, str] | None
    ) -> bool:
        """Add one batch of every process to the sums of the owners; tell whether any process had one to add.

        Args:
            kinds: Layers of the batch of this process.
            get: Returns the sums of one of these.
            tied: For each of these the first one with the same inputs; None if this process is done.
        """
        if all(self.ranks.gather(tied is None)):
            return False
        groups = tied_by_all(self.ranks, tied or {})
        owned: dict[Hashable, list[str]] = {}
        for name in groups:
            if self.owners[name] == self.ranks.rank:
                owned.setdefault(groups[name], []).append(name)
        new = {name for name in groups if name not in self._sums}
        for group in owned.values():
            self._untie([name for name in group if name not in new])
        merged_inputs: list[SecondMoment] = []
        for name, merged in sums_over(self.ranks, kinds, get, self.owners.__getitem__, groups, self._new_sums):
            self._num_positions[name] = self._num_positions.get(name, 0) + merged.inputs.count
            if self.owners[name] != self.ranks.rank:
                continue
            if name in new:
                self._sums[name] = self._new_sums(name, merged.kind, self._home(self.ranks.device))
                made = [tied_name for tied_name in owned[groups[name]] if tied_name in new and tied_name in self._sums]
                self._sums[name].tie_inputs(self._sums[made[0]].inputs)
            sums = self._sums[name]
            sums.merge_(merged, with_inputs=not any(sums.inputs is inputs for inputs in merged_inputs))
            merged_inputs.append(sums.inputs)
        return True

    def _go_on_with(self, sums: Mapping[str, LayerSums]) -> None:
        self._num_positions = {name: layer.inputs.count for name, layer in sums.items()}
        self._sums = {name: layer for name, layer in sums.items() if self.owners[name] == self.ranks.rank}


class _BatchSums:
    """The sums of one batch. A group is summed when its first layer is asked for, so that few are in memory at once.

    Args:
        groups: Calls of layers that read the same inputs.
        kinds: What each layer is.
        make: Returns the sums of a group.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Sequence[CallRows]]],
        kinds: Mapping[str, LayerKind],
        make: Callable[[Mapping[str, Sequence[CallRows]], Mapping[str, LayerKind]], dict[str, LayerSums]],
    ) -> None:
        self.tied_inputs = {name: next(iter(group)) for group in groups for name in group}
        self.kinds = {name: kinds[name] for name in self.tied_inputs}
        self._groups = {name: group for group in groups for name in group}
        self._make = make
        self._made: dict[str, LayerSums] = {}

    def take(self, name: str) -> LayerSums:
        """Return the sums of a layer, once."""
        if name not in self._made:
            self._made |= self._make(self._groups[name], self.kinds)
        return self._made.pop(name)


def owners_of(kinds: Mapping[str, LayerKind], ranks: Ranks) -> dict[str, int]:
    """Spread layers over processes, so that the largest part is as small as possible.

    Layers of one module with inputs of one width (gate and up; query, key and value) can be tied if they are together.
    They are, unless that makes the largest part larger.

    >>> mlp = {"mlp.gate": LayerKind(2, 8, False), "mlp.up": LayerKind(2, 8, False), "mlp.down": LayerKind(8, 2, False)}
    >>> owners_of(mlp, Ranks())
    {'mlp.gate': 0, 'mlp.up': 0, 'mlp.down': 0}
    """
    together: dict[tuple[str, int], list[str]] = {}
    for name, kind in kinds.items():
        together.setdefault((name.rpartition(".")[0], kind.d_in), []).append(name)
    choices = []
    for groups in ([*together.values()], [[name] for name in kinds]):
        sizes = {
            group[0]: float(kinds[group[0]].d_in ** 2 + sum(kinds[name].d_out ** 2 for name in group))
            for group in groups
        }
        owners = ranks.owners(sizes)
        load = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(ranks.size)]
        choices.append((max(load), {name: owners[group[0]] for group in groups for name in group}))
    _, best = min(choices, key=lambda choice: choice[0])
    return {name: best[name] for name in kinds}
