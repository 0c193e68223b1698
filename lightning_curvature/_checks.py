"""Argument validation. Its errors say what is wrong, what was found, and what to do."""

import math
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any


def check_energy(energy: Any, what: str = "energy") -> float:
    """Return ``energy`` as a float in ``(0, 1]``.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it lies outside ``(0, 1]``.
    """
    if isinstance(energy, bool) or not isinstance(energy, (int, float)):
        raise TypeError(f"{what} must be a number in (0, 1], found {energy!r}.")
    if not 0.0 < energy <= 1.0:
        raise ValueError(
            f"{what} must be in (0, 1], found {energy!r}. It is the share of the curvature mass that is kept: "
            "1.0 keeps the weights as they are."
        )
    return float(energy)


def check_share(value: Any, what: str) -> float:
    """Return ``value`` as a float in ``(0, 1]``.

    Raises:
        ValueError: If it is not such a number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        raise ValueError(f"{what} must be a number in (0, 1], found {value!r}.")
    return float(value)


def check_count(value: Any, what: str) -> int:
    """Return ``value`` as a positive integer.

    Raises:
        ValueError: If it is not an integer of at least one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be an integer of at least 1, found {value!r}.")
    return value


def check_weights(values: Sequence[Any], count: int, what: str) -> list[float]:
    """Return as many positive numbers as there are things to weigh, as floats.

    Raises:
        ValueError: If one of them is not a positive number, or there are more or fewer.
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
            raise ValueError(f"{what} must be positive numbers, found {value!r}.")
    if len(values) != count:
        raise ValueError(f"{what} must be {count} numbers, one for each, found {len(values)}.")
    return [float(value) for value in values]


def check_option(value: Any, options: Iterable[str], what: str) -> str:
    """Return ``value`` if it is one of ``options``.

    Raises:
        ValueError: If it is not; lists the options.
    """
    options = list(options)
    if value not in options:
        raise ValueError(f"{what} must be one of {options}, found {value!r}.{did_you_mean(str(value), options)}")
    return str(value)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return a sentence that names the options closest to ``name``, or nothing.

    >>> did_you_mean("fc3", ["fc1", "fc2", "head"])
    " Did you mean 'fc1' or 'fc2'?"
    """
    near = sorted(get_close_matches(name, list(options), n=3, cutoff=0.5))
    return f" Did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def listing(names: Iterable[str], limit: int = 12) -> str:
    """Return names for an error message, cut after ``limit``.

    >>> listing(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
