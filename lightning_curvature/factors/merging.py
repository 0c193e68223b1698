"""Factors of one model from several sources, such as texts or machines, as one set: which go together, what it says."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_curvature.factors.fingerprints import Fingerprint, difference
from lightning_curvature.factors.kronecker import KroneckerFactors

_SAME = {"fisher": "Fisher kind", "positions": "rule of the positions that count"}
"""Entries of the provenance that all sources have in common."""
_OWN = ("corpus", "tokens", "batches_skipped", "sources")
"""Entries of the provenance that belong to one source, though another may say the same."""


def merge_files(
    paths: Sequence[str | os.PathLike[str]], weights: Sequence[float] | None = None, force: bool = False
) -> KroneckerFactors:
    """Return the factors of several files of one model together; the files are read layer by layer.

    Args:
        paths: Factor files, two or more.
        weights: What each file counts, whatever its positions; by default each counts with its positions.
        force: Merge factors that were collected on other weights, too.

    Returns:
        The factors. Their provenance lists the files under ``sources``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a file is no factor file; if there are fewer than two; if they were collected on other weights,
            with another Fisher kind, or with another rule of positions; or as :meth:`KroneckerFactors.merge`.
    """
    if len(paths) < 2:
        raise ValueError(f"There is nothing to merge: name two factor files or more, found {len(paths)}.")
    sources = [KroneckerFactors.open(path) for path in paths]
    _check_kind(paths, sources)
    if not force:
        _check_origins(paths, sources)
    return merge_sources(sources, [{"file": Path(path).name} for path in paths], weights)


def merge_sources(
    sources: Sequence[KroneckerFactors], facts: Sequence[Mapping[str, Any]], weights: Sequence[float] | None
) -> KroneckerFactors:
    """Return the factors of several sources together, with a provenance that lists them.

    The entries that all have in common stay as they are; the others go to ``sources``, a list with an entry for each.

    Args:
        sources: Factors of the same layers, one set or more.
        facts: What to add to the entry of each source.
        weights: As :meth:`KroneckerFactors.merge`.

    Raises:
        ValueError: As :meth:`KroneckerFactors.merge`.
    """
    merged = sources[0].merge(*sources[1:], weights=weights)
    provenances = [source.provenance for source in sources]
    common = {
        key: value
        for key, value in provenances[0].items()
        if key not in _OWN and all(key in other and other[key] == value for other in provenances)
    }
    listed = [
        {**fact, **{key: value for key, value in provenance.items() if key not in common}}
        for fact, provenance in zip(facts, provenances, strict=True)
    ]
    if weights is not None:
        listed = [{**entry, "weight": float(weight)} for entry, weight in zip(listed, weights, strict=True)]
    merged.provenance = {**common, "sources": listed}
    return merged


def _check_kind(paths: Sequence[str | os.PathLike[str]], sources: Sequence[KroneckerFactors]) -> None:
    """Raise ``ValueError`` if factors say that they were collected in different ways."""
    for key, what in _SAME.items():
        known = [
            (path, source.provenance[key])
            for path, source in zip(paths, sources, strict=True)
            if key in source.provenance
        ]
        for path, value in known[1:]:
            if value != known[0][1]:
                raise ValueError(
                    f"Cannot merge factors with another {what}: {known[0][0]} has {known[0][1]!r}, {path} has "
                    f"{value!r}. Collect both with one --{key}."
                )


def _check_origins(paths: Sequence[str | os.PathLike[str]], sources: Sequence[KroneckerFactors]) -> None:
    """Raise ``ValueError`` if a layer says in two sources that it was collected on different weights.

    What a fingerprint holds of a weight, entries at even distances, is compared as if it were the weight.
    """
    first: dict[str, tuple[str | os.PathLike[str], Fingerprint]] = {}
    for path, source in zip(paths, sources, strict=True):
        for name, weight in source.fingerprints().items():
            other, recorded = first.setdefault(name, (path, weight))
            sample = functools.partial(torch.tensor, weight["sample"], dtype=torch.float64)
            if difference(recorded, weight["hash"], sample) is not None:
                raise ValueError(
                    f"Layer {name!r}: {path} was collected on other weights than {other}. Merge factors of one model, "
                    "or these all the same (--force)."
                )
