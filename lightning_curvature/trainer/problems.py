"""What goes wrong in a run: the callback is an extra, so in a fit an error costs what it is about, and a warning."""

import functools
import re
from collections.abc import Callable
from typing import Any, Protocol

from lightning.pytorch.utilities import rank_zero_warn

from lightning_curvature.distributed import Ranks
from lightning_curvature.recording.objectives import NothingToCollectError


class Problems:
    """The errors that were met in a run; each is told once.

    Attributes:
        given_up: Why the callback stopped; None as long as it goes on.
    """

    def __init__(self) -> None:
        self.given_up: str | None = None
        self._skipped_steps: dict[str, None] = {}
        self._without_copy: set[str] = set()

    @property
    def first(self) -> str | None:
        """Why the callback stopped, or collected nothing from a step; None if all went well."""
        return self.given_up or next(iter(self._skipped_steps), None)

    def meet(self, error: Exception) -> None:
        """Say what an error costs: one step if that holds nothing to collect, and otherwise everything that follows."""
        if isinstance(error, NothingToCollectError):
            if str(error) not in self._skipped_steps:
                self._skipped_steps[str(error)] = None
                rank_zero_warn(f"KFACEditCallback collected nothing from a step, and training goes on: {error}")
        elif self.given_up is None:
            self.given_up = str(error) or type(error).__name__
            rank_zero_warn(
                f"KFACEditCallback stops, and training goes on: {self.given_up} Checkpoints that are saved from now "
                "on have no edited copy."
            )

    def stop_together(self, ranks: Ranks) -> bool:
        """Tell whether the callback has stopped on any process, and stop on this one, too. A collective."""
        reasons = [reason for reason in ranks.gather(self.given_up) if reason]
        if reasons and self.given_up is None:
            self.given_up = reasons[0]
        return bool(reasons)

    def tell_no_copy(self, step: int, reason: str) -> None:
        """Say why a checkpoint has no edited copy; once for each reason, whatever steps and values it names."""
        kind = re.sub(r"[\d.]+", "", reason)
        if kind not in self._without_copy:
            self._without_copy.add(kind)
            rank_zero_warn(
                f"The checkpoint of step {step} has no edited copy: {reason}. Later ones that have none for "
                "the same reason are not told."
            )


class Guarded(Protocol):
    """A callback whose hooks are guarded."""

    _in_fit: bool
    _problems: Problems


def never_ends_a_fit(hook: Callable[..., None]) -> Callable[..., None]:
    """Make a warning of an error that a hook meets while a fit runs."""

    @functools.wraps(hook)
    def guarded(self: Guarded, *args: Any, **kwargs: Any) -> None:
        try:
            hook(self, *args, **kwargs)
        except Exception as error:
            if not self._in_fit:
                raise
            self._problems.meet(error)

    return guarded
