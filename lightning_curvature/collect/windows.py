"""The factors of a run as it goes on: windows of training steps, validations, several processes, and resumed runs."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_curvature._checks import listing
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.sums import LayerSums
from lightning_curvature.collect.tied_inputs import STATE_VERSION, sums_over, tied_by_all
from lightning_curvature.distributed import Ranks
from lightning_curvature.factors.files import load_state
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.factors.sharded import ShardedFactors

MIN_WINDOW = 4096
"""Positions of the shortest default window; docs/decisions.md shows why."""


class WindowedFactors:
    """The factors of the latest complete window of a run, and the sums of the window that goes on.

    With several processes each keeps those of its own data, and they are added up when they are used
    (:meth:`synchronise`); or, if the collector shards, each keeps those of its own layers.

    Args:
        collector: Collects.
        window: Positions that each layer sees in a window of training steps, on all processes together; None for eight
            times its larger dimension and at least ``MIN_WINDOW``.
        settings: What must be the same in a run that goes on with these factors: primitives.
        every: Collect one window in so many; see :meth:`is_due`.

    Attributes:
        complete: Factors of the latest complete window, of the sums of this process.
    """

    def __init__(self, collector: Collector, window: int | None, settings: Mapping[str, Any], every: int = 1) -> None:
        self.collector = collector
        self.window = window
        self.every = every
        self.settings = dict(settings)
        self.complete = KroneckerFactors()
        self._num_started = 0
        self._synchronised = KroneckerFactors()
        self._synchronised_at = (0, 0)  # windows started and batches used when that was done
        self._batch = 0  # number of the latest training batch
        self._began: int | None = None  # batch with which the window began; None in a pause
        self._pause = (0, 0)  # batch at which the pause ends, and batches of the latest window

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.collector.ranks

    @property
    def factors(self) -> KroneckerFactors:
        """The factors of the latest complete window, or of everything so far; empty before the first batch.

        With several processes, those of the latest :meth:`synchronise`.
        """
        return self.synchronise() if self.ranks.size == 1 else self._synchronised

    @property
    def silent(self) -> list[str]:
        """Chosen layers that ran on no process, neither in this window nor in the latest complete one. A collective."""
        seen = set().union(*self.ranks.gather(set(self.complete) | set(self.collector.num_positions)))
        return [name for name in self.collector.chosen or [] if name not in seen]

    def synchronise(self) -> KroneckerFactors:
        """Return the factors of all processes, by the positions that each has seen. A collective.

        Raises:
            RuntimeError: If the processes chose different layers.
        """
        now = (self._num_started, self.collector.num_batches)
        if any(self.ranks.gather(now != self._synchronised_at)):
            self._synchronised = self._sharded() if self.collector.is_sharded else self._merged()
        self._synchronised_at = now
        return self._synchronised

    def _chosen(self) -> list[str]:
        """Return the chosen layers, in an order that is the same on all processes."""
        choices = self.ranks.gather(self.collector.chosen)
        chosen = next((choice for choice in choices if choice is not None), [])
        for rank, choice in enumerate(choices):
            if choice is not None and set(choice) != set(chosen):
                raise RuntimeError(
                    f"layers={self.settings.get('layers')!r} chose {listing(chosen)} on one process and "
                    f"{listing(choice)} on process {rank}, since other layers ran in its first batch. Name the layers."
                )
        return chosen

    def _merged(self) -> KroneckerFactors:
        """Return the factors of all processes, each of which has those of its own data."""
        part, chosen = self.complete or self.collector.factors(), self._chosen()
        if self.ranks.size == 1:
            return part
        kinds = {name: self.collector.kinds[name] for name in part}
        groups = tied_by_all(self.ranks, part.tied_inputs())
        merged = sums_over(self.ranks, kinds, lambda name: LayerSums.of(part[name]), groups=groups)
        factors = {name: sums.factors() for name, sums in merged}
        return KroneckerFactors({name: factors[name] for name in chosen if name in factors}, self._provenance(part))

    def _sharded(self) -> KroneckerFactors:
        """Return the factors of all processes, each of which has those of its own layers."""
        part, chosen = self.complete or self.collector.factors(), self._chosen()
        owners = self.collector.owners or {}
        counts = dict[str, int]()
        for layer_counts in self.ranks.gather(part.counts()):
            counts |= layer_counts
        counts = {name: counts[name] for name in chosen if name in counts}
        return ShardedFactors(part, counts, owners, self.ranks, self._provenance(part))

    def _provenance(self, part: KroneckerFactors) -> dict[str, Any]:
        """Return the provenance of all factors: that of the first process that collected, and the batches all skipped.

        Args:
            part: The factors of this process.
        """
        provenances = [facts for facts in self.ranks.gather(part.provenance if part else {}) if facts]
        if not provenances:
            return {}
        skipped = sum(facts["batches_skipped"] for facts in provenances)
        return {**provenances[0], "batches_skipped": skipped, "processes": self.ranks.size}

    def is_due(self, batch: int, last: float) -> bool:
        """Tell whether to collect from a training step.

        One window in ``every`` is collected, with a pause after it; so is the end of the run. Single steps further
        apart would cost the same, and average over older weights.

        Args:
            batch: Training batches before this one.
            last: Number of the last one; infinite if it is not known.
        """
        self._batch = batch
        until, steps = self._pause
        left = last - batch + 1
        if self._began is None:
            # The last window begins a little early, for it may take more steps than the one before.
            if batch < until and not steps <= left <= math.ceil(1.25 * steps):
                return False
            self._began = batch
        return True

    def end_step(self, step: int) -> None:
        """End the window if it is full, after a training step that was collected.

        Args:
            step: Number of the optimizer step.
        """
        positions = self.collector.num_positions
        if positions and all(count >= self._length(name) for name, count in positions.items()):
            self.collector.provenance["step"] = step
            steps = self._batch + 1 - (self._batch if self._began is None else self._began)
            self._pause, self._began = (self._batch + 1 + (self.every - 1) * steps, steps), None
            self.start(complete=True)

    def _length(self, name: str) -> int:
        kind = self.collector.kinds[name]
        return self.window or max(8 * kind.d_in, 8 * kind.d_out, MIN_WINDOW)

    def start(self, complete: bool) -> None:
        """Start a new window; the one that ends here is ``complete``, or is dropped."""
        if complete:
            self.complete = self.collector.factors()
        self.collector.reset()
        self._num_started += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what tells that a factor file belongs to a checkpoint: primitives; empty before the first batch."""
        batches = self.collector.num_batches_seen
        return {"settings": self.settings, "batches": batches} if batches else {}

    def snapshot(self) -> tuple[KroneckerFactors, dict[str, Any]] | None:
        """Return what :meth:`resume` needs, None before the first batch: arguments of ``KroneckerFactors.save``.

        A collective; only what the first process gets is complete.
        """
        factors = self.synchronise()
        if not factors:
            return None
        state = {
            "collector": self.collector.state_dict(),
            "provenance": self.collector.provenance,
            "complete": any(self.ranks.gather(bool(self.complete))),
            "batches": self.collector.num_batches_seen,
            "began": self._began,
            "pause": list(self._pause),
        }
        return factors.gathered(), state

    def resume(self, state: Mapping[str, Any], file: Path | None) -> str | None:
        """Go on where a run was saved; with nothing changed, return why that cannot be done. A collective.

        Args:
            state: What :meth:`state_dict` returned.
            file: What :meth:`snapshot` returned, saved; None if it is lost.
        """
        content = self._read(state, file)
        reasons = [reason for reason in self.ranks.gather(content if isinstance(content, str) else None) if reason]
        if reasons or isinstance(content, str):
            return reasons[0]
        factors, saved = content
        self.collector.load_state_dict(saved["collector"])
        self.collector.provenance = saved["provenance"]
        self._began, self._pause = saved["began"], (saved["pause"][0], saved["pause"][1])
        if saved["complete"]:
            self.complete = self._part(factors)
        self._num_started += 1
        return None

    def _read(self, state: Mapping[str, Any], file: Path | None) -> str | tuple[KroneckerFactors, dict[str, Any]]:
        """Return the factors and the state in a file, or the reason why a run cannot go on with them."""
        differ = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if differ:
            return f"its factors were collected with other {listing(differ)}"
        if file is None:
            return "its factors are kept in a file beside it, which is not there (move them together)"
        try:
            factors, saved = KroneckerFactors.load(file), load_state(file)
        except ValueError as error:
            return f"its factors cannot be read: {str(error).rstrip('.')}"
        if saved is None or saved.get("batches") != state["batches"]:
            return f"{file.name} was written with another checkpoint"
        if saved["collector"].get("version") != STATE_VERSION:
            return f"{file.name} was written by another version of this package"
        return factors, saved

    def _part(self, factors: KroneckerFactors) -> KroneckerFactors:
        """Return the part of this process of the factors of all processes."""
        owners, part = self.collector.owners, self.ranks.part
        layers: dict[str, LayerFactors] = {}
        if owners is not None:
            layers = {name: layer for name, layer in factors.items() if owners[name] == self.ranks.rank}
        elif self.ranks.is_counted:
            layers = {
                name: dataclasses.replace(
                    layer,
                    num_inputs=part(layer.num_inputs),
                    num_seen=part(layer.num_seen),
                    num_gradients=part(layer.num_gradients),
                    num_losses=part(layer.num_losses),
                )
                for name, layer in factors.items()
            }
        return KroneckerFactors(layers, factors.provenance)
