"""Sweeps: many edits of one model, measured, and which of them nothing beats.

The curvature basis of each layer and the coefficients of its weight are computed once for all energies, and each
measurement is written down at once, so that an interrupted sweep goes on where it stopped.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        editors: By name, what to compare: other layers, other scores, other methods. Their own energies do not matter.
        energies: Shares to keep, in (0, 1].
        path: CSV file, rewritten after each measurement; rows that it holds are not measured again.
        data: Says what ``measure`` measures on, such as a hash of files: a file goes on only with the same.

    Returns:
        One row each: ``edit`` (name of the editor), ``energy``, ``of`` (hash of weights, factors, editor and ``data``),
        and the metrics. The first one is the unedited model.

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
    if not editors or not energies:
        raise ValueError("A sweep needs at least one editor and one energy.")
    if UNEDITED in editors:
        raise ValueError(f"{UNEDITED!r} is the name of the model without an edit; give the editor another one.")
    model = hashlib.sha256(f"{factors.digest()} {data}".encode())
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor):
            model.update(f"{name} {tensor_hash(tensor)}".encode())
    of = {name: _identity(model.hexdigest(), editor) for name, editor in editors.items()}
    of[UNEDITED] = model.hexdigest()[:16]
    wanted = [(UNEDITED, 1.0), *((name, float(energy)) for name in editors for energy in energies)]
    for editor in editors.values():
        editor.at(energies[0]).edited_weights(module, factors)  # what it lacks is said before anything is measured
    trial: WeightEditor | None = None
    known = {} if path is None else _known(Path(path), of)
    rows: list[Row] = []
    for name, energy in tqdm(wanted, desc="sweep", disable=None):
        row = known.get((name, energy))
        if row is None:
            if name == UNEDITED:
                metrics = measure()
            else:
                if trial is None or rows[-1]["edit"] != name:
                    trial = editors[name].at(1.0)
                with trial.at(energy).applied(module, factors):
                    metrics = measure()
            row = {"edit": name, "energy": energy, "of": of[name], **{key: float(v) for key, v in metrics.items()}}
        if rows and row.keys() != rows[0].keys():
            raise ValueError(
                f"The metrics {[*rows[0]][len(KEYS) :]} were measured first, now {[*row][len(KEYS) :]}. Measure the "
                "same ones each time" + (f", or write this sweep to another file than {path}." if path else ".")
            )
        rows.append(row)
        if path is not None and (name, energy) not in known:
            known[name, energy] = row
            _write(Path(path), list(known.values()))
    return rows


def pareto(rows: Sequence[Row], minimize: Sequence[str] = (), maximize: Sequence[str] = ()) -> list[Row]:
    """Return the rows that no other row beats: none is as good in every metric and better in one.

    Args:
        rows: As :func:`sweep` returns them.
        minimize: Metrics of which less is better, ``["strict", "perplexity"]`` for example.
        maximize: Metrics of which more is better, such as ``val_accuracy``.

    Returns:
        The front, in the order of its first metric; rows that tie in all of them are all there. A metric that is not a
        number is the worst.

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
        (own, number)
        for number, own in enumerate(costs)
        if not any(other != own and all(o <= s for o, s in zip(other, own, strict=True)) for other in costs)
    ]
    return [rows[number] for _, number in sorted(front)]


def read_sweep(path: str | os.PathLike[str]) -> list[Row]:
    """Read the rows of a CSV file that :func:`sweep` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no such table; names the line.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        table = csv.reader(file)
        try:
            names = _columns(next(table, []))
            return [_row(names, cells) for cells in table if cells]
        except (csv.Error, ValueError) as error:  # also bytes that are no UTF-8
            raise ValueError(
                f"{path}, line {table.line_num}: {error}. Take the line out, or write the sweep to another file."
            ) from error


def _columns(names: list[str]) -> list[str]:
    if not {*KEYS} <= {*names} or len({*names}) < len(names):
        raise ValueError(f"the columns must be {', '.join(KEYS)} and different metrics, found {names!r:.80}")
    return names


def _row(names: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells in {len(names)} columns")
    row: Row = {key: cell if key in ("edit", "of") else float(cell) for key, cell in zip(names, cells, strict=True)}
    check_energy(row["energy"])
    return row


def _identity(model: str, editor: WeightEditor) -> str:
    """Return a hash of a model and the settings of an editor other than its energy."""
    settings = {key: value for key, value in vars(editor).items() if key != "energy" and not key.startswith("_")}
    text = json.dumps([model, type(editor).__qualname__, settings], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _known(path: Path, of: Mapping[str, str]) -> dict[tuple[str, float], Row]:
    """Return the rows of a file by editor and energy."""
    if not path.exists():
        return {}
    rows = read_sweep(path)
    for row in rows:
        if row["edit"] in of and row["of"] != of[row["edit"]]:
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
