"""What an edit may cost on probes."""

import math
from collections.abc import Iterable, Mapping

from lightning_curvature._checks import check_option, did_you_mean, listing

COSTS = ("perplexity",)


BENEFITS = ("accuracy", "recall", "recall_open_book")
"""Metrics of a probe that tell what an edit costs."""


class Limit:
    """What an edit may cost by one metric of a probe.

    Args:
        name: ``"{probe}/{metric}"``.
        multiple: What the metric may become, as a multiple of what it was.

    Raises:
        TypeError: If the multiple is no number.
        ValueError: If the metric is not one that tells what an edit costs, or the multiple lies on its wrong side.
    """

    def __init__(self, name: str, multiple: float) -> None:
        self.name = name
        self.probe, _, metric = name.partition("/")
        check_option(metric, (*COSTS, *BENEFITS), f"The metric of target {name!r}")
        self.benefit = metric in BENEFITS
        if isinstance(multiple, bool) or not isinstance(multiple, (int, float)):
            raise TypeError(f"target {name!r} must be a number, found {multiple!r}.")
        if not (0 < multiple <= 1 if self.benefit else 1 < multiple < math.inf):
            side = "at most 1: the share that is kept" if self.benefit else "above 1: what it may become"
            raise ValueError(f"target {name!r} must be {side}, as a multiple of what it was; found {multiple!r}.")
        self.multiple = float(multiple)

    def used(self, multiple: float) -> float:
        """Return the share of what is allowed that is used where the metric became a multiple; above 1 is too much.

        >>> round(Limit("val/perplexity", 1.21).used(1.1), 3)
        0.5
        """
        sign = -1.0 if self.benefit else 1.0
        cost = sign * math.log(multiple) if 0 < multiple < math.inf else math.inf
        allowed = sign * math.log(self.multiple)
        return cost / allowed if allowed else math.inf if cost > 0 else 0.0


class Target:
    """What an edit may cost on probes: no limit may be exceeded.

    Args:
        entry: ``"{probe}/{metric}"``, and the multiple that the metric may become; one entry or several.

    Raises:
        TypeError: If it is no such dict.
        ValueError: As :class:`Limit`.

    Attributes:
        of_updates: Whether updates are edited, since a reference or of an adapter, and not weights.
    """

    def __init__(self, entry: Mapping[str, float]) -> None:
        if not isinstance(entry, Mapping) or not entry:
            raise TypeError(f"target must be a dict such as {{'clean/perplexity': 1.1}}; found {entry!r}.")
        self.entry = dict(entry)
        self.of_updates = False
        self.limits = [Limit(name, multiple) for name, multiple in entry.items()]

    @property
    def probes(self) -> list[str]:
        """Names of the probes that it is about."""
        return list(dict.fromkeys(limit.probe for limit in self.limits))

    def spent(self, results: Mapping[str, float], before: Mapping[str, float]) -> float:
        """Return the multiple that the metric has become; of several, e to the largest share of a limit that is used.

        Args:
            results: The metrics by name.
            before: Those of the unedited model.
        """
        if len(self.limits) == 1:
            (name,) = self.entry
            return results[name] / before[name]
        return math.exp(min(max(self.used(results, before).values()), 700.0))

    def used(self, results: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
        """Return the share of each limit that is used, by its name; arguments as of :meth:`spent`."""
        return {limit.name: limit.used(results[limit.name] / before[limit.name]) for limit in self.limits}

    @property
    def most(self) -> float:
        """What :meth:`spent` may become."""
        return self.limits[0].multiple if len(self.limits) == 1 else math.e

    @property
    def higher_is_better(self) -> bool:
        """Whether what :meth:`spent` returns is a benefit."""
        return len(self.limits) == 1 and self.limits[0].benefit

    def found(self, value: float) -> str:
        """Say what an edit costs, given what :meth:`spent` returned."""
        if len(self.limits) == 1:
            return f"{value:.4g} times what it was"
        return f"{math.log(value):.0%} of what the dearest of them allows"

    def check(self, files: Iterable[str], loaders: bool) -> None:
        """Check before a run starts that there may be such probes.

        Args:
            files: Names of the probes that are files.
            loaders: Whether there are others, whose names are known when they are measured.

        Raises:
            ValueError: If there can be none.
        """
        for probe in self.probes:
            if not loaders and probe not in files:
                raise ValueError(
                    f"{self}: there is no probe {probe!r}. Give a file, probes={{{probe!r}: ...}}, or a method "
                    "probe_dataloader() of the module or the datamodule."
                )

    def missing(self, measured: Iterable[str], files: Iterable[str] = ()) -> str | None:
        """Return what to do where no probe has a metric; None if all are there.

        Args:
            measured: Names of the metrics that are measured.
            files: Names of probes that are files, whose metrics are not known yet.
        """
        measured, files = sorted(measured), set(files)
        for limit in self.limits:
            if limit.name in measured or limit.probe in files:
                continue
            names = [name for name in measured if name.startswith(f"{limit.probe}/")]
            return (
                f"{self}: no probe measures {limit.name}.{did_you_mean(limit.name, names)} Give files (probes=) or a "
                f"method probe_dataloader() of the module or datamodule; measured: {listing(names) or 'nothing'}."
            )
        return None

    def __str__(self) -> str:
        return "target " + ", ".join(f"{limit.name} x {limit.multiple:g}" for limit in self.limits)
