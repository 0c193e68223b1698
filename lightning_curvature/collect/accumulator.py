"""Accumulation: from the inputs and gradients of a batch to the running sums of one process, of its own data."""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from lightning_curvature.collect.precision import full_precision
from lightning_curvature.collect.streams import SideStreams
from lightning_curvature.collect.sums import LayerKind, LayerSums
from lightning_curvature.collect.tied_inputs import state_of, sums_from, sums_over, tie_again, tied_by_all, tied_inputs
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.recording.calls import BatchGradients
from lightning_curvature.recording.rows import CallRows, read_batch, same_inputs

NewSums = Callable[[str, LayerKind, torch.device], LayerSums]
"""Returns empty sums of a layer, given its name, its kind, and the device on which they live."""
Home = Callable[[torch.device], torch.device]
"""Returns where the sums of the layers on a device live."""


class Accumulator:
    """Running sums of the chosen layers, of the data of this process.

    Args:
        new_sums: Makes the sums of a layer.
        home: Tells where they live.
        positions: Which positions count.
        ranks: The processes of the run.

    Attributes:
        num_batches_seen: Batches that this process has taken, whether they could be used or not.
        num_batches: Those that were used.
        num_skipped: Those that were not, because they held NaN or infinite values.
        owners: Which process keeps the sums of a layer, by name; None: each process keeps those of its own data.
    """

    owners: Mapping[str, int] | None = None

    def __init__(self, new_sums: NewSums, home: Home, positions: str, ranks: Ranks) -> None:
        self.ranks = ranks
        self.num_batches_seen = self.num_batches = self.num_skipped = 0
        self._new_sums, self._home = new_sums, home
        self._positions = positions
        self._sums: dict[str, LayerSums] = {}
        self._side = SideStreams()
        self._known_groups: set[tuple[str, ...]] = set()  # layers whose inputs are tied, to one another and no others

    @property
    def sums(self) -> Mapping[str, LayerSums]:
        """The sums that this process keeps, by layer."""
        self._side.wait()
        return self._sums

    @property
    def num_positions(self) -> dict[str, int]:
        """Positions of each layer since the last reset, over all processes.

        This process knows only its own, and takes the others' for as many.
        """
        return {name: sums.inputs.count * self.ranks.num_data for name, sums in self._sums.items()}

    def take(self) -> dict[str, LayerFactors]:
        """Return the factors of all sums, and start anew; a sum goes as soon as its factors are there."""
        sums = dict(self.sums)
        self.reset()
        return {name: sums.pop(name).factors() for name in list(sums)}

    def reset(self) -> None:
        """Start to sum anew."""
        self._sums, self._known_groups = {}, set()

    @torch.no_grad()
    def add(self, batch: BatchGradients | None, kinds: Mapping[str, LayerKind]) -> None:
        """Add a batch. A collective where the sums are spread.

        Args:
            batch: The batch; None for one that gave nothing.
            kinds: What each layer is.
        """
        tensors = [] if batch is None else batch.tensors
        with self._side.beside(tensors, self._exchanging), full_precision({tensor.device.type for tensor in tensors}):
            rows = None
            if batch is not None:
                rows = read_batch(batch, self._positions)
                self.num_batches_seen += 1
                self._count(was_used=rows is not None)
            self._add_groups(same_inputs(rows or []), kinds)

    @property
    def _exchanging(self) -> list[torch.device]:
        """Devices on which batches of other processes are added, also by one that has none of its own."""
        return []

    def _add_groups(self, groups: Sequence[Mapping[str, Sequence[CallRows]]], kinds: Mapping[str, LayerKind]) -> None:
        """Add the calls of a batch, in groups of layers that read the same inputs."""
        if self.ranks.is_counted:
            self._make_sums(groups, kinds)
            for group in groups:
                self._add_group(group, self._sums)

    def _count(self, was_used: bool) -> None:
        self.num_batches += was_used
        self.num_skipped += not was_used
        if not was_used and self.num_skipped == 1:
            warnings.warn(
                "A batch with NaN or infinite activations or gradients was left out of the K-FAC factors; further "
                "ones are counted (batches_skipped) without a warning.",
                stacklevel=2,
            )

    def _make_sums(self, groups: Sequence[Mapping[str, Sequence[CallRows]]], kinds: Mapping[str, LayerKind]) -> None:
        """Make the sums of new layers; the inputs of a group are tied, as long as they were tied in every batch."""
        names = {tuple(group) for group in groups}
        if names <= self._known_groups:
            return
        for group in groups:
            device = self._home(next(iter(group.values()))[0].inputs.device)
            new = [name for name in group if name not in self._sums]
            for name in new:
                self._sums[name] = self._new_sums(name, kinds[name], device)
                self._sums[name].tie_inputs(self._sums[new[0]].inputs)
            for name in group:
                self._sums[name].move(device)  # those of a resumed run come from a file
            self._untie(group)
        self._known_groups |= names

    def _untie(self, group: Collection[str]) -> None:
        """Give the layers of a group a moment of their own, if it is tied to layers outside the group.

        In the batches so far all of them read the same inputs, so each side goes on with a copy of that moment.
        """
        tied: dict[str, list[str]] = {}
        for name, first_name in tied_inputs(self._sums).items():
            tied.setdefault(first_name, []).append(name)
        for names in tied.values():
            inside = [name for name in names if name in group]
            if 0 < len(inside) < len(names):
                inputs = self._sums[inside[0]].inputs.copy()
                for name in inside:
                    self._sums[name].tie_inputs(inputs)

    def _add_group(self, group: Mapping[str, Sequence[CallRows]], sums: Mapping[str, LayerSums]) -> None:
        """Add the calls of layers that read the same inputs."""
        first = tied_inputs({name: sums[name] for name in group})
        for calls in zip(*group.values(), strict=True):
            inputs = calls[0].input_rows()
            for rows in calls:
                name = rows.call.name
                if first[name] == name:
                    sums[name].add_inputs(inputs)
                sums[name].add_gradients(inputs, rows.gradient_rows(), rows.scale, rows.num_seen, rows.num_losses)

    def drain(self) -> None:
        """Take part in what other processes still add, until all are done; here there is nothing to do."""

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted run needs to go on, of all processes together: tensors and primitives.

        A collective. The sums come back on the first process alone.
        """
        counters = self.ranks.gather((self.num_batches_seen, self.num_batches, self.num_skipped))
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
        self.num_batches_seen = state["num_seen"]
        self.num_batches, self.num_skipped = map(self.ranks.part, (state["num_batches"], state["num_skipped"]))
        self._known_groups = set()
        self._go_on_with(sums_from(state, self._new_sums))

    def _go_on_with(self, sums: Mapping[str, LayerSums]) -> None:
        """Keep this process's part of the sums of all."""
        parts = {name: layer.part(self.ranks) for name, layer in sums.items()}
        tie_again(parts, tied_inputs(sums))
        self._sums = parts if self.ranks.is_counted else {}
