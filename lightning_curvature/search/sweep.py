"""Sweeps: many edits of one model, measured, and the edits that no other edit beats.

The curvature basis of each layer and the coefficients of its weight are computed once for all energies. Each
measurement is written to the file at once, so that an interrupted sweep goes on where it stopped.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from lightning_curvature._checks import check_energy
from lightning_curvature.editing.weight_editor import WeightEditor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.storage.atomic import replacing
from lightning_curvature.storage.hashes import tensor_hash

Row = dict[str, Any]
UNEDITED = "unedited"
KEYS = ("edit", "energy", "of")
"""The columns of a row before its metrics."""


def sweep(
    module: nn.Module,
    factors: KroneckerFactors,
    measure: Callable[[], Mapping[str, float]],
    editors: Mapping[str, WeightEditor],
    energies: Iterable[float],
    path: str | os.PathLike[str] | None = None,
    data: str = "",
) -> list[Row]:
    """Measure a model under each editor at each energy.

    Args:
        module: The network; edited only while it is measured.
        factors: Its factors.
        measure: Measures the module as it is, on data to choose by; report on other data.
        editors: Editors to compare, by name, with other layers, scores or methods. Their own energies do not matter.
        energies: Shares to keep, in (0, 1].
        path: CSV file, rewritten after each measurement; rows that it holds are not measured again.
        data: Names the data that ``measure`` uses, a hash of files for example; a sweep goes on only with the same.

    Returns:
        A row for each edit, with ``edit`` (name of the editor), ``energy``, ``of`` (hash of weights, factors, editor
        and ``data``), and the metrics. The first row is the unedited model.

    Raises:
        ValueError: If there is nothing to try, an editor or an energy cannot be used, or the file holds a sweep of
            something else, or with other metrics.

    Example:
        >>> import torch
        >>> from lightning_curvature import CurvatureEditor, LayerFactors
        >>> layer = nn.Sequential(nn.Linear(2, 2))
        >>> eye = LayerFactors(A=torch.diag(torch.tensor([3.0, 1.0])), G=torch.eye(2), num_inputs=9, num_gradients=9)
        >>> size = lambda: {"size": float(layer[0].weight.detach().norm())}
        >>> rows = sweep(layer, KroneckerFactors({"0": eye}), size, {"K-FAC": CurvatureEditor()}, [0.5, 1.0])
        >>> [(row["edit"], row["energy"]) for row in rows]
        [('unedited', 1.0), ('K-FAC', 0.5), ('K-FAC', 1.0)]
    """
    energies = [check_energy(energy) for energy in energies]
    _check_editors(module, factors, editors, energies)
    hashes = _hashes(module, factors, editors, data)
    known = {} if path is None else _known_rows(Path(path), hashes)
    rows: list[Row] = []
    total = 1 + len(editors) * len(energies)
    for name, energy, trial in tqdm(_edits(editors, energies), desc="sweep", total=total, disable=None):
        row = known.get((name, energy))
        if row is None:
            with nullcontext() if trial is None else trial.applied(module, factors):
                metrics = {key: float(value) for key, value in measure().items()}
            row = {"edit": name, "energy": energy, "of": hashes[name], **metrics}
        _check_metrics(row, rows, path)
        rows.append(row)
        if path is not None and (name, energy) not in known:
            known[name, energy] = row
            _write(Path(path), list(known.values()))
    return rows


def _check_editors(
    module: nn.Module, factors: KroneckerFactors, editors: Mapping[str, WeightEditor], energies: Sequence[float]
) -> None:
    """Raise ``ValueError`` if there is nothing to try or an editor cannot be used, before anything is measured."""
    if not editors or not energies:
        raise ValueError("A sweep needs at least one editor and one energy.")
    if UNEDITED in editors:
        raise ValueError(f"{UNEDITED!r} is the name of the model without an edit; give the editor another one.")
    for editor in editors.values():
        editor.at(energies[0]).edited_weights(module, factors)


def _hashes(
    module: nn.Module, factors: KroneckerFactors, editors: Mapping[str, WeightEditor], data: str
) -> dict[str, str]:
    """Return what the rows of each edit are ``of``: a hash of weights, factors, data, and settings of the editor.

    The energy of an editor is not one of these settings.
    """
    digest = hashlib.sha256(f"{factors.digest()} {data}".encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor_hash(tensor)}".encode())
    model = digest.hexdigest()
    hashes = {UNEDITED: model[:16]}
    for name, editor in editors.items():
        settings = {key: value for key, value in vars(editor).items() if key != "energy" and not key.startswith("_")}
        text = json.dumps([model, type(editor).__qualname__, settings], sort_keys=True, default=repr)
        hashes[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return hashes


def _edits(
    editors: Mapping[str, WeightEditor], energies: Sequence[float]
) -> Iterator[tuple[str, float, WeightEditor | None]]:
    """Yield name, energy and editor of each edit; first the unedited model, which has no editor."""
    yield UNEDITED, 1.0, None
    for name, editor in editors.items():
        first = editor.at(1.0)  # the editors that are made from it compute the coefficients of each weight once
        for energy in energies:
            yield name, energy, first.at(energy)


def _check_metrics(row: Row, rows: Sequence[Row], path: str | os.PathLike[str] | None) -> None:
    """Raise ``ValueError`` if a row has other metrics than the rows before it."""
    if rows and row.keys() != rows[0].keys():
        raise ValueError(
            f"The metrics {[*rows[0]][len(KEYS) :]} were measured first, now {[*row][len(KEYS) :]}. Measure the "
            "same ones each time" + (f", or write this sweep to another file than {path}." if path else ".")
        )


def pareto(rows: Sequence[Row], minimize: Sequence[str] = (), maximize: Sequence[str] = ()) -> list[Row]:
    """Return the rows that no other row beats; to beat a row is to be as good in every metric and better in one.

    Args:
        rows: As :func:`sweep` returns them.
        minimize: Metrics of which less is better, ``["strict", "perplexity"]`` for example.
        maximize: Metrics of which more is better, such as ``val_accuracy``.

    Returns:
        The front, in the order of its first metric, with all rows of equal metrics. NaN counts as the worst value.

    Raises:
        ValueError: If no metric is named.

    Example:
        >>> rows = [{"strict": s, "perplexity": p} for s, p in ((0.9, 10.0), (0.5, 11.0), (0.6, 12.0))]
        >>> [row["strict"] for row in pareto(rows, minimize=["strict", "perplexity"])]
        [0.5, 0.9]
    """
    if not (minimize or maximize):
        raise ValueError("A front needs metrics: name those to minimize or to maximize.")

    def cost(row: Row) -> tuple[float, ...]:
        values = [row[name] for name in minimize] + [-row[name] for name in maximize]
        return tuple(value if value == value else float("inf") for value in values)

    costs = [cost(row) for row in rows]
    front = [
        (candidate, number)
        for number, candidate in enumerate(costs)
        if not any(_is_beaten(candidate, rival) for rival in costs)
    ]
    return [rows[number] for _, number in sorted(front)]


def _is_beaten(costs: Sequence[float], rival: Sequence[float]) -> bool:
    return rival != costs and all(lower <= cost for lower, cost in zip(rival, costs, strict=True))


def read_sweep(path: str | os.PathLike[str]) -> list[Row]:
    """Read the rows of a CSV file that :func:`sweep` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table; names the line.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        table = csv.reader(file)
        try:
            names = _check_columns(next(table, []))
            return [_row(names, cells) for cells in table if cells]
        except (csv.Error, ValueError) as error:  # also bytes that are no UTF-8
            raise ValueError(
                f"{path}, line {table.line_num}: {error}. Take the line out, or write the sweep to another file."
            ) from error


def _check_columns(names: list[str]) -> list[str]:
    if not {*KEYS} <= {*names} or len({*names}) < len(names):
        raise ValueError(f"the columns must be {', '.join(KEYS)} and different metrics, found {names!r:.80}")
    return names


def _row(names: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells in {len(names)} columns")
    row: Row = {key: cell if key in ("edit", "of") else float(cell) for key, cell in zip(names, cells, strict=True)}
    check_energy(row["energy"])
    return row


def _known_rows(path: Path, hashes: Mapping[str, str]) -> dict[tuple[str, float], Row]:
    """Return the rows of a file by name of the edit and energy; none if there is no file.

    Raises:
        ValueError: If a row is of something else than ``hashes`` say, or the file cannot be read.
    """
    if not path.exists():
        return {}
    rows = read_sweep(path)
    for row in rows:
        if row["edit"] in hashes and row["of"] != hashes[row["edit"]]:
            raise ValueError(
                f"{path} holds a sweep of other weights, factors, data or settings (edit {row['edit']!r}). Write this "
                "one to another file, or delete that one."
            )
    return {(row["edit"], row["energy"]): row for row in rows}


def _write(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
