"""Accumulation: from the inputs and gradients of a batch to running sums, of one process or spread over several."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.fisher import Gradients
from lightning_curvature.layers import gradient_rows, input_rows
from lightning_curvature.positions import counted_positions
from lightning_curvature.ranks import Ranks, whole
from lightning_curvature.sums import LayerKind, LayerSums, sums_over
from lightning_curvature.taps import LayerCall


@dataclass
class BatchGradients:
    """What one batch adds.

    Args:
        calls: Calls of the chosen layers.
        passes: Of each backward pass, the gradients at the outputs of the calls.
        draws: Passes over which to average; 1 if they are to be summed.
        mask: Mask of the batch, for ``positions="mask:KEY"``.
    """

    calls: Sequence[LayerCall]
    passes: Sequence[Gradients]
    draws: int
    mask: Tensor | None = None


class Accumulator:
    """Running sums of the chosen layers.

    With ``owners`` the sums are spread over the processes: each keeps those of its own layers, of the data of all, and
    the batches of all processes are added up as they come.

    Attributes:
        sums: By layer.
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
        self.sums: dict[str, LayerSums] = {}
        self.num_seen = self.num_batches = self.num_skipped = 0
        self.ranks = ranks
        self.owners = owners
        self._new_sums, self._home = new_sums, home
        self._positions = positions
        self._totals: dict[str, int] = {}

    @property
    def num_positions(self) -> dict[str, int]:
        """Positions of each layer since the last reset, over all processes.

        Where each process keeps the sums of its own data, it knows only those, and takes the others' for as many.
        """
        if self.owners is not None:
            return dict(self._totals)
        return {name: sums.inputs.count * self.ranks.num_data for name, sums in self.sums.items()}

    def reset(self) -> None:
        """Start to sum anew."""
        self.sums, self._totals = {}, {}

    @torch.no_grad()
    def add(self, batch: BatchGradients | None, kinds: Mapping[str, LayerKind]) -> None:
        """Add a batch; None for a batch that cannot be used. A collective where the sums are spread.

        Args:
            batch: The batch.
            kinds: What each layer is.
        """
        usable = batch is not None and self._is_finite(batch)
        by_layer: dict[str, list[int]] = {}
        if batch is not None and usable:
            for index, call in enumerate(batch.calls):
                by_layer.setdefault(call.name, []).append(index)

        def of_batch(name: str, sums: LayerSums | None) -> LayerSums | None:
            if batch is not None:
                for index in by_layer[name]:
                    sums = self._add_call(batch, index, kinds[name], sums)
            return sums

        if self.owners is None:
            for name in by_layer:
                sums = of_batch(name, self.sums.get(name))
                if sums is not None:
                    self.sums[name] = sums
        else:
            self._exchange({name: kinds[name] for name in by_layer}, lambda name: of_batch(name, None), done=False)
        self.num_seen += batch is not None
        self.num_batches += usable

    def join(self) -> None:
        """Take part in what the others still add, until all are done. A collective where the sums are spread."""
        while self.owners is not None and self._exchange({}, lambda _: None, done=True):
            pass

    def _exchange(self, kinds: Mapping[str, LayerKind], get: Callable[[str], LayerSums | None], done: bool) -> bool:
        """Add one batch of every process to the sums of the owners; tell whether anyone had one to add."""
        owners = self.owners or {}
        if all(self.ranks.gather(done)):
            return False

        def sums_of(name: str) -> LayerSums:
            return get(name) or LayerSums.zero(kinds[name], self.ranks.device)

        for name, merged in sums_over(self.ranks, kinds, sums_of, owners.__getitem__):
            self._totals[name] = self._totals.get(name, 0) + merged.inputs.count
            if owners[name] != self.ranks.rank:
                continue
            if name not in self.sums:
                self.sums[name] = self._new_sums(name, merged.kind, self._home(self.ranks.device))
            self.sums[name].merge_(merged)
        return True

    def _is_finite(self, batch: BatchGradients) -> bool:
        """Tell whether a batch can be used; warn of the first one that cannot."""
        for call in batch.calls:
            call.check_input()
        values = [call.inputs for call in batch.calls]
        values += [g for gradients in batch.passes for g in gradients if g is not None]
        if all(_is_finite(value) for value in values):
            return True
        self.num_skipped += 1
        if self.num_skipped == 1:
            warnings.warn(
                "A batch with NaN or infinite activations or gradients was left out of the K-FAC factors; further "
                "ones are counted (batches_skipped) without a warning.",
                stacklevel=2,
            )
        return False

    def _add_call(self, batch: BatchGradients, index: int, kind: LayerKind, sums: LayerSums | None) -> LayerSums | None:
        """Add one call to sums, or to new ones; a process that does not count takes part, and adds nothing."""
        call = batch.calls[index]
        inputs = input_rows(call.module, whole(call.inputs))
        gradients = [whole(gradient) for passed in batch.passes if (gradient := passed[index]) is not None]
        rows = [gradient_rows(call.module, gradient) for gradient in gradients]
        if not self.ranks.counts:
            return None
        counted = counted_positions(self._positions, call, rows, len(inputs), batch.mask)
        if sums is None:
            sums = self._new_sums(call.name, kind, self._home(inputs.device))
        sums.move(self._home(inputs.device))  # those of a resumed run come from a file
        sums.add(inputs[counted], [gradient[counted] for gradient in rows], batch.draws, len(inputs))
        return sums

    def state_dict(self) -> dict[str, Any]:
        """Return what an interrupted run needs to go on, of all processes together: tensors and primitives.

        A collective. The sums come back on the first process alone.
        """
        counters = self.ranks.gather((self.num_seen, self.num_batches, self.num_skipped))
        kinds = {name: sums.kind for name, sums in self.sums.items()}
        merged = sums_over(self.ranks, kinds, self.sums.__getitem__, lambda _: 0)
        return {
            "num_seen": max(seen for seen, _, _ in counters),
            "num_batches": sum(used for _, used, _ in counters),
            "num_skipped": sum(skipped for _, _, skipped in counters),
            "sums": {name: sums.state_dict() for name, sums in merged if self.ranks.rank == 0},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken, with as many processes as there are now."""
        self.num_seen = state["num_seen"]
        self.num_batches, self.num_skipped = map(self.ranks.share, (state["num_batches"], state["num_skipped"]))
        found = {name: LayerSums.from_state_dict(sums) for name, sums in state["sums"].items()}
        if self.owners is None:
            parts = {name: sums.share(self.ranks) for name, sums in found.items()}
            self.sums = parts if self.ranks.counts else {}
        else:
            self._totals = {name: sums.inputs.count for name, sums in found.items()}
            self.sums = {name: sums for name, sums in found.items() if self.owners[name] == self.ranks.rank}


def _is_finite(values: Tensor) -> bool:
    """Tell whether no value is NaN or infinite; a sum keeps either, and is several times faster than isfinite."""
    total = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
    return bool(torch.isfinite(whole(total)))
