"""The factors of a run as it goes on: windows of training steps, validations, and resumed runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_curvature._checks import listing
from lightning_curvature.collect import Collector
from lightning_curvature.factors import KroneckerFactors, load_state

MIN_WINDOW = 4096
"""Positions of the shortest default window; docs/decisions.md shows why."""


class Collection:
    """The factors of the latest complete window of a run, and the sums of the window that goes on.

    Args:
        collector: Collects.
        window: Positions that each layer sees in a window of training steps; None for eight times its larger dimension
            and at least ``MIN_WINDOW``.
        settings: What must be the same in a run that goes on with these factors: primitives.
    """

    def __init__(self, collector: Collector, window: int | None, settings: Mapping[str, Any]) -> None:
        self.collector = collector
        self.window = window
        self.settings = dict(settings)
        self._complete = KroneckerFactors()

    @property
    def factors(self) -> KroneckerFactors:
        """The factors of the latest complete window, or of everything so far; empty before the first batch."""
        return self._complete or self.collector.factors()

    def end_step(self, step: int) -> None:
        """End a training step, and the window if it is full."""
        self.collector.close()
        sums = self.collector.sums.values()
        if sums and all(s.inputs.count >= (self.window or max(8 * max(s.shape), MIN_WINDOW)) for s in sums):
            self.collector.provenance["step"] = step
            self.start(complete=True)

    def start(self, complete: bool) -> None:
        """Start a new window; the one that ends here is ``complete``, or is dropped."""
        if complete:
            self._complete = self.collector.factors()
        self.collector.sums = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what tells that a factor file belongs to a checkpoint: primitives; empty before the first batch."""
        return {"settings": self.settings, "batches": self.collector.num_batches} if self.factors else {}

    def save(self, path: Path) -> bool:
        """Write the factors and the running sums, from which a resumed run goes on; tell whether there were any."""
        factors = self.factors
        if factors:
            state = {
                "collector": self.collector.state_dict(),
                "provenance": self.collector.provenance,
                "complete": bool(self._complete),
            }
            factors.save(path, state)
        return bool(factors)

    def resume(self, state: Mapping[str, Any], file: Path | None) -> str | None:
        """Go on where a run was saved; with nothing changed, return why that cannot be done.

        Args:
            state: What :meth:`state_dict` returned.
            file: What :meth:`save` wrote, or None if it is lost.

        Raises:
            ValueError: If the file is not a complete factor file.
        """
        differ = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if differ:
            return f"its factors were collected with other {listing(differ)}"
        if file is None:
            return "its factors are kept in a file beside it, which is not there (move them together)"
        factors, saved = KroneckerFactors.load(file), load_state(file)
        if saved is None or saved["collector"]["num_batches"] != state["batches"]:
            return f"{file.name} was written with another checkpoint"
        self.collector.load_state_dict(saved["collector"])
        self.collector.provenance = saved["provenance"]
        if saved["complete"]:
            self._complete = factors
        return None
