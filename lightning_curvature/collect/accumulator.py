"""Accumulation: from the inputs and gradients of a batch to running sums, of one process or spread over several."""

import warnings
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch

from lightning_curvature.collect.moments import SecondMoment, full_precision
from lightning_curvature.collect.streams import SideStreams
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.collect.tied_inputs import state_of, sums_from, sums_over, tie_again, tied_by_all, tied_inputs
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.kronecker import LayerFactors
from lightning_curvature.recording.rows import BatchGradients, CallRows, read_batch, same_inputs


class Accumulator:
    """Running sums of the chosen layers.

    With ``owners`` the sums are spread over the processes: each keeps those of its own layers, of the data of all, and
    the batches of all processes are added up as they come.

    Attributes:
        num_seen: Batches that this process has taken, whether they could be used or not.
        num_batches: Those that were used.
        num_skipped: Those that were not, because they held NaN or infinite values.

    Args:
        new_sums: Returns empty sums of a layer, given its name, its kind, and the device on which they live.
        home: Where the sums of a layer on a device live.
        positions: Which positions count.
        ranks: The processes of the run.
        owners: Which process keeps the sums of a layer, by name; None if each keeps those of its own data.
    """

    def __init__(
        self,
        new_sums: Callable[[str, LayerKind, torch.device], LayerSums],
        home: Callable[[torch.device], torch.device],
        positions: str,
        ranks: Ranks,
        owners: Mapping[str, int] | None,
    ) -> None:
        self._sums: dict[str, LayerSums] = {}
        self.num_seen = self.num_batches = self.num_skipped = 0
        self.ranks = ranks
        self.owners = owners
        self._new_sums, self._home = new_sums, home
        self._positions = positions
        self._totals: dict[str, int] = {}
        self._side = SideStreams()
        self._tied: set[tuple[str, ...]] = set()  # groups that share, and nothing with others

    @property
    def sums(self) -> Mapping[str, LayerSums]:
        """The sums of this process, by layer."""
        self._side.wait()
        return self._sums

    @property
    def _exchanging(self) -> list[torch.device]:
        """Where batches of other processes are added: beside the main stream, also by one that has none of its own."""
        return [] if self.owners is None else [self.ranks.device]

    @property
    def num_positions(self) -> dict[str, int]:
        """Positions of each layer since the last reset, over all processes.

        Where each process keeps the sums of its own data, it knows only those, and takes the others' for as many.
        """
        if self.owners is not None:
            return dict(self._totals)
        return {name: sums.inputs.count * self.ranks.num_data for name, sums in self._sums.items()}

    def take(self) -> dict[str, LayerFactors]:
        """Return the factors of all sums, and start anew; a sum goes as soon as its factors are there."""
        sums = dict(self.sums)
        self.reset()
        return {name: sums.pop(name).factors() for name in list(sums)}

    def reset(self) -> None:
        """Start to sum anew."""
        self._sums, self._totals, self._tied = {}, {}, set()

    @torch.no_grad()
    def add(self, batch: BatchGradients | None, kinds: Mapping[str, LayerKind]) -> None:
        """Add a batch; None for a batch that cannot be used. A collective where the sums are spread.

        Args:
            batch: The batch.
            kinds: What each layer is.
        """
        tensors = [] if batch is None else batch.tensors
        with self._side.beside(tensors, self._exchanging), full_precision({tensor.device.type for tensor in tensors}):
            read = None if batch is None else read_batch(batch, self._positions)
            self.num_seen += batch is not None
            self.num_batches += read is not None
            if batch is not None and read is None:
                self._warn_of_skipped()
            groups = same_inputs(read or [])
            if self.owners is None:
                if not self.ranks.is_counted:
                    return
                self._tie_inputs(groups, kinds)
                for group in groups:
                    self._add_group(group, self._sums)
                return
            groups = [part for group in groups for part in self._by_owner(group)]
            first = {name: next(iter(group)) for group in groups for name in group}
            of_first = {next(iter(group)): group for group in groups}
            made: dict[str, LayerSums] = {}

            def of_batch(name: str) -> LayerSums:
                if name not in made:
                    group = of_first[first[name]]
                    made.update({name: self._new_sums(name, kinds[name], self.ranks.device) for name in group})
                    for other in group:
                        made[other].tie_inputs(made[name].inputs)
                    if self.ranks.is_counted:  # one that does not count takes part, and adds nothing
                        self._add_group(group, made)
                return made.pop(name)

            self._exchange({name: kinds[name] for name in first}, of_batch, first)

    def _by_owner(self, group: Mapping[str, list[CallRows]]) -> list[dict[str, list[CallRows]]]:
        """Cut a group of layers that read the same inputs into those of one owner each."""
        owners, parts = self.owners or {}, dict[int, dict[str, list[CallRows]]]()
        for name, calls in group.items():
            parts.setdefault(owners[name], {})[name] = calls
        return list(parts.values())

    def _tie_inputs(self, groups: Sequence[Mapping[str, list[CallRows]]], kinds: Mapping[str, LayerKind]) -> None:
        """Let layers that read the same now share the inputs' moment, as long as they did in every batch before."""
        names = {tuple(group) for group in groups}
        if names <= self._tied:
            return
        for group in groups:
            device = self._home(next(iter(group.values()))[0].inputs.device)
            new = [name for name in group if name not in self._sums]
            for name in new:
                self._sums[name] = self._new_sums(name, kinds[name], device)
                self._sums[name].tie_inputs(self._sums[new[0]].inputs)
            for name in group:
                self._sums[name].move(device)  # those of a resumed run come from a file
            self._part(group)
        self._tied |= names

    def _part(self, group: Collection[str]) -> None:
        """Let layers that read the same now go their own ways from those that they shared with, and that do not."""
        together: dict[str, list[str]] = {}
        for name, first in tied_inputs(self._sums).items():
            together.setdefault(first, []).append(name)
        for names in together.values():
            here = [name for name in names if name in group]
            if 0 < len(here) < len(names):
                inputs = self._sums[here[0]].inputs.copy()
                for name in here:
                    self._sums[name].tie_inputs(inputs)

    def _add_group(self, group: Mapping[str, Sequence[CallRows]], sums: Mapping[str, LayerSums]) -> None:
        """Add the calls of layers that read the same inputs."""
        first = tied_inputs({name: sums[name] for name in group})
        for calls in zip(*group.values(), strict=True):
            inputs = calls[0].input_rows()
            for own in calls:
                name = own.call.name
                if first[name] == name:
                    sums[name].add_inputs(inputs)
                sums[name].add_gradients(inputs, own.gradient_rows(), own.scale, own.num_seen)

    def drain(self) -> None:
        """Take part in what the others still add, until all are done. A collective where the sums are spread."""
        nothing: dict[str, LayerSums] = {}
        with self._side.beside([], self._exchanging):
            while self.owners is not None and self._exchange({}, nothing.__getitem__, None):
                pass

    def _exchange(
        self, kinds: Mapping[str, LayerKind], get: Callable[[str], LayerSums], tied: Mapping[str, str] | None
    ) -> bool:
        """Add one batch of every process to the sums of the owners; tell whether anyone had one to add.

        Args:
            kinds: Layers of the batch of this process.
            get: Returns the sums of one of these.
            tied: For each of these the first one with the same inputs, as :func:`.tied_inputs` tells; None if this
                process is done.
        """
        owners = self.owners or {}
        if all(self.ranks.gather(tied is None)):
            return False
        groups = tied_by_all(self.ranks, tied or {})
        own: dict[Hashable, list[str]] = {}
        for name in groups:
            if owners[name] == self.ranks.rank:
                own.setdefault(groups[name], []).append(name)
        new = {name for name in groups if name not in self._sums}
        for group in own.values():
            self._part([name for name in group if name not in new])
        merged_inputs: list[SecondMoment] = []
        for name, merged in sums_over(self.ranks, kinds, get, owners.__getitem__, groups, self._new_sums):
            self._totals[name] = self._totals.get(name, 0) + merged.inputs.count
            if owners[name] != self.ranks.rank:
                continue
            if name in new:
                self._sums[name] = self._new_sums(name, merged.kind, self._home(self.ranks.device))
                known = [other for other in own[groups[name]] if other in new and other in self._sums]
                self._sums[name].tie_inputs(self._sums[known[0]].inputs)
            sums = self._sums[name]
            sums.merge_(merged, with_inputs=not any(sums.inputs is known for known in merged_inputs))
            merged_inputs.append(sums.inputs)
        return True

    def _warn_of_skipped(self) -> None:
        self.num_skipped += 1
        if self.num_skipped == 1:
            warnings.warn(
                "A batch with NaN or infinite activations or gradients was left out of the K-FAC factors; further "
                "ones are counted (batches_skipped) without a warning.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted run needs to go on, of all processes together: tensors and primitives.

        A collective. The sums come back on the first process alone.
        """
        counters = self.ranks.gather((self.num_seen, self.num_batches, self.num_skipped))
        kinds = {name: sums.kind for name, sums in self.sums.items()}
        groups = tied_by_all(self.ranks, tied_inputs(self.sums))
        merged = sums_over(self.ranks, kinds, self.sums.__getitem__, lambda _: 0, groups, self._new_sums)
        sums = {name: layer for name, layer in merged if self.ranks.rank == 0}
        return {
            "num_seen": max(seen for seen, _, _ in counters),
            "num_batches": sum(used for _, used, _ in counters),
            "num_skipped": sum(skipped for _, _, skipped in counters),
            **state_of(sums),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with as many processes as there are now."""
        self.num_seen = state["num_seen"]
        self.num_batches, self.num_skipped = map(self.ranks.part, (state["num_batches"], state["num_skipped"]))
        found = sums_from(state, self._new_sums)
        self._tied = set()
        if self.owners is None:
            parts = {name: sums.part(self.ranks) for name, sums in found.items()}
            tie_again(parts, tied_inputs(found))
            self._sums = parts if self.ranks.is_counted else {}
        else:
            self._totals = {name: sums.inputs.count for name, sums in found.items()}
            self._sums = {name: sums for name, sums in found.items() if self.owners[name] == self.ranks.rank}


def owners_of(kinds: Mapping[str, LayerKind], ranks: Ranks) -> dict[str, int]:
    """Spread layers over processes, so that the one with the most to keep keeps as little as possible.

    Layers of one module with inputs of one width (gate and up; query, key and value) can share the inputs' moment if
    they are together. They are, unless that makes the largest part larger.

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
