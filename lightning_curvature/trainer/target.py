"""What an edit may cost on a probe."""

import math
from collections.abc import Iterable, Mapping

from lightning_curvature._checks import check_option, did_you_mean, listing

COSTS = ("perplexity",)


BENEFITS = ("accuracy", "recall", "recall_open_book")
"""Metrics of a probe that tell what an edit costs."""


class Target:
    """What an edit may cost on a probe.

    Args:
        entry: One entry, ``"{probe}/{metric}"`` and the multiple that the metric may become.

    Raises:
        TypeError: If it is no such dict.
        ValueError: If the metric is not one that tells what an edit costs, or the multiple lies on its wrong side.
    """

    def __init__(self, entry: Mapping[str, float]) -> None:
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise TypeError(
                f"target must be a dict of one entry, such as {{'clean/perplexity': 1.1}}; found {entry!r}."
            )
        ((self.name, limit),) = entry.items()
        self.entry = dict(entry)
        self.probe, _, metric = self.name.partition("/")
        check_option(metric, (*COSTS, *BENEFITS), f"The metric of target {self.name!r}")
        self.benefit = metric in BENEFITS
        if isinstance(limit, bool) or not isinstance(limit, (int, float)):
            raise TypeError(f"target {self.name!r} must be a number, found {limit!r}.")
        if not (0 < limit <= 1 if self.benefit else 1 < limit < math.inf):
            side = "at most 1: the share that is kept" if self.benefit else "above 1: what it may become"
            raise ValueError(f"target {self.name!r} must be {side}, as a multiple of what it was; found {limit!r}.")
        self.limit = float(limit)

    def check(self, files: Iterable[str], loaders: bool) -> None:
        """Check before a run starts that there may be such a probe.

        Args:
            files: Names of the probes that are files.
            loaders: Whether there are others, whose names are known when they are measured.

        Raises:
            ValueError: If there can be none.
        """
        if not loaders and self.probe not in files:
            raise ValueError(
                f"{self}: there is no probe {self.probe!r}. Give a file, probes={{{self.probe!r}: ...}}, or a method "
                "probe_dataloader() of the module or the datamodule."
            )

    def unmeasured(self, measured: Iterable[str]) -> str:
        """Return what to do where no probe has the metric."""
        names = sorted(name for name in measured if name.startswith(f"{self.probe}/"))
        return (
            f"{self}: no probe measures that.{did_you_mean(self.name, names)} Give files (probes=) or a method "
            f"probe_dataloader() of the module or datamodule; measured: {listing(names) or 'nothing'}."
        )

    def __str__(self) -> str:
        return f"target {self.name} x {self.limit:g}"
