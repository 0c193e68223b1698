"""Names of many layers on few lines: those that differ in numbers alone go together."""

import re
from collections.abc import Hashable, Mapping, Sequence

MANY = 12
"""Up to so many layers each has a line of its own."""
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def grouped(layers: Mapping[str, Hashable]) -> dict[str, list[str]]:
    """Return names of layers by a title for those that go on one line.

    Args:
        layers: By name, what else layers of one line have in common, their shape for example.

    Example:
        >>> names = [f"layers.{i}.mlp.{part}" for i in range(7) for part in ("up", "down")]
        >>> list(grouped(dict.fromkeys(names)))
        ['layers.{0..6}.mlp.up', 'layers.{0..6}.mlp.down']
        >>> list(grouped({"layers.0.up": None, "layers.1.up": None}))
        ['layers.0.up', 'layers.1.up']
    """
    if len(layers) <= MANY:
        return {name: [name] for name in layers}
    groups: dict[tuple[str, Hashable], list[str]] = {}
    for name, common in layers.items():
        groups.setdefault((_NUMBER.sub("#", name), common), []).append(name)
    titles: dict[str, list[str]] = {}
    for names in groups.values():
        numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
        titles[_NUMBER.sub("{}", names[0]).format(*(_span(place) for place in zip(*numbers, strict=True)))] = names
    return titles


def _span(numbers: Sequence[int]) -> str:
    """Return some numbers as a set of a shell: ``{0..5}`` or ``{0,2,5}``; one number as it is."""
    found = sorted(set(numbers))
    if len(found) == 1:
        return str(found[0])
    runs: list[list[int]] = []
    for number in found:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(runs) == 1:
        return f"{{{found[0]}..{found[-1]}}}"
    parts = [",".join(map(str, run)) if len(run) < 3 else f"{run[0]}..{run[-1]}" for run in runs]
    return f"{{{','.join(parts)}}}"
