"""What an edit costs: selection, decomposition, projection, a sweep, and one layer of a 7B model.

Protocol. Factors are sample covariances of Gaussian rows with eigenvalues that fall as ``i ** -1.2``, weights are
random. Variants take turns in rounds; medians, and ranges in brackets.

1. *selection*: the threshold search against a full sort of all pairs and against a heap that takes pairs in falling
   order, at energy 0.9, for spectra that fall as ``i ** -1.2`` and ``i ** -0.6``; "same" says whether all three chose
   the same pairs.
2. *edit*: one layer at energy 0.85 against its two decompositions plus four matrix products of its shapes, float64.
3. *decomposition*: all eigenvectors (``torch.linalg.eigh``, what the package does) against eigenvalues alone, against
   LAPACK's reduction to a tridiagonal matrix with eigenvectors of the kept part alone (scipy), and four layers one
   after the other against two threads with one core each.
4. *sweep*: ten energies of one layer with coefficients computed once, against ten separate edits with the same bases.
5. *needed*: with ``--factors``, the share of eigenvectors that the kept pairs of factor files touch.
6. *large*: with ``--large``, a layer of 11008 x 4096 in a process of its own: seconds, and peak memory beyond its
   factors and weight (resident; on a GPU, what torch's allocator gave out).

    python benchmarks/bench_edit.py --large --out benchmarks/results/edit.json
    python benchmarks/bench_edit.py --device cuda --parts edits --large --out benchmarks/results/edit-gpu.json
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg.lapack as lapack
import torch
from torch import Tensor

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.memory import edit_bytes, size
from support.costs import forget_peak, resident
from support.environment import parser
from support.measuring import in_turn, peak_bytes, ratios, show, spread, write
from support.selections import by_heap, by_sort
from support.spectra import covariance, random_layer, spectrum

LARGE = (11008, 4096)

Rows = list[list[object]]
Results = dict[str, dict[str, list[float]]]


def selection(rounds: int) -> tuple[Rows, Results]:
    """Measure the search for the kept pairs."""
    rows, results = [], {}
    shapes = ((512, 256), (1024, 512), (2048, 512), (4096, 1024), LARGE)
    for power, shape in itertools.product((1.2, 0.6), shapes):
        lam, mu = spectrum(shape[0], power), spectrum(shape[1], power)
        variants = {
            "search": lambda lam=lam, mu=mu: select_staircase(lam, mu, 0.9).columns,
            "sort": lambda lam=lam, mu=mu: by_sort(lam, mu, 0.9),
        }
        if shape != LARGE:
            variants["heap"] = lambda lam=lam, mu=mu: by_heap(lam, mu, 0.9)
        kept = float(variants["search"]().sum() / (len(lam) * len(mu)))
        same = all(torch.equal(work(), variants["search"]()) for work in variants.values())
        results[f"{shape}, {power}"] = seconds = in_turn(variants, rounds)
        times = [
            f"{statistics.median(seconds[name]) * 1000:.1f}" if name in seconds else ""
            for name in ("search", "sort", "heap")
        ]
        over = [spread(ratios(seconds, name, "search"), 0) if name in seconds else "" for name in ("sort", "heap")]
        rows.append(["{} x {}".format(*shape), power, f"{kept:.1%}", *times, *over, "yes" if same else "NO"])
    return rows, results


def edits(rounds: int, device: str) -> tuple[Rows, Results]:
    """Measure edits against what they cannot do without."""
    rows, results, editor = [], {}, CurvatureEditor(0.85)
    for shape in ((512, 256), (1024, 1024), (2048, 512), (512, 2048), (2048, 2048)):
        weight, factors = random_layer(shape, device)
        A, G, W = (tensor.double() for tensor in (factors.A, factors.G, weight))

        def edit(weight=weight, factors=factors):
            fresh = LayerFactors(A=factors.A.clone(), G=factors.G.clone(), num_inputs=9, num_gradients=9)
            editor.edit_weight("fc", weight, fresh, 0.85, False)

        def least(A=A, G=G, W=W):
            (_, U), (_, V) = torch.linalg.eigh(G), torch.linalg.eigh(A)
            U @ (U.T @ W @ V) @ V.T

        results[f"{shape}"] = seconds = in_turn({"edit": edit, "least": least}, rounds)
        times = [f"{statistics.median(durations):.3f}" for durations in seconds.values()]
        rows.append(["{} x {}".format(*shape), *times, spread(ratios(seconds, "edit", "least"))])
    return rows, results


def leading_eigenvectors(matrix: np.ndarray, count: int) -> np.ndarray:
    """Return the eigenvectors of the largest eigenvalues, by one reduction and LAPACK's stemr and ormqr."""
    dim = len(matrix)
    reduced, diagonal, beside, tau, _ = lapack.dsytrd(matrix, lower=1, lwork=int(lapack.dsytrd_lwork(dim, lower=1)[0]))
    _, _, vectors, _ = lapack.dstemr(diagonal, np.append(beside, 0.0), 2, 0.0, 0.0, dim - count + 1, dim)
    vectors, reflectors = np.asfortranarray(vectors[:, :count]), np.asfortranarray(reduced[1:, :-1])
    below = np.asfortranarray(vectors[1:])
    work = int(lapack.dormqr("L", "N", reflectors, tau, below, -1)[1][0])
    vectors[1:] = lapack.dormqr("L", "N", reflectors, tau, below, work)[0]
    return vectors


def decompositions(rounds: int) -> tuple[Rows, Results]:
    """Measure ways to decompose."""
    rows, results = [], {}

    def decompose(matrix: Tensor) -> None:
        torch.set_num_threads(1)
        torch.linalg.eigh(matrix)

    for dim in (512, 1024, 2048):
        matrices = [covariance(dim, seed).double() for seed in range(4)]
        first = matrices[0].numpy()

        def threads(matrices=matrices):
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(decompose, matrices))

        results[f"{dim}"] = seconds = in_turn(
            {
                "all": lambda m=matrices: torch.linalg.eigh(m[0]),
                "values": lambda m=matrices: torch.linalg.eigvalsh(m[0]),
                "10 %": lambda m=first, d=dim: leading_eigenvectors(m, d // 10),
                "30 %": lambda m=first, d=dim: leading_eigenvectors(m, 3 * d // 10),
                "60 %": lambda m=first, d=dim: leading_eigenvectors(m, 6 * d // 10),
                "four in turn": lambda m=matrices: [torch.linalg.eigh(matrix) for matrix in m],
                "four, two threads": threads,
            },
            rounds,
        )
        parts = [spread(ratios(seconds, name, "all")) for name in ("values", "10 %", "30 %", "60 %")]
        rows.append(
            [
                dim,
                f"{statistics.median(seconds['all']):.3f}",
                *parts,
                spread(ratios(seconds, "four, two threads", "four in turn")),
            ]
        )
    return rows, results


def sweep(rounds: int) -> tuple[Rows, Results]:
    """Measure ten energies of one layer."""
    weight, factors = random_layer((2048, 512))
    energies = [0.5 + 0.05 * step for step in range(10)]
    _ = factors.basis
    together = CurvatureEditor().at(1.0)

    def shared():
        for energy in energies:
            together.at(energy).edit_weight("fc", weight, factors, energy, False)

    def separate():
        for energy in energies:
            CurvatureEditor(energy).edit_weight("fc", weight, factors, energy, False)

    seconds = in_turn({"together": shared, "separate": separate}, rounds)
    times = [f"{statistics.median(seconds[name]):.3f}" for name in ("together", "separate")]
    return [["2048 x 512", *times, spread(ratios(seconds, "together", "separate"))]], {"sweep": seconds}


def needed(paths: list[Path]) -> Rows:
    """Return which share of the eigenvectors of G and of A the kept pairs of factor files touch, over their layers."""
    rows = []
    for path, energy in itertools.product(paths, (0.7, 0.8, 0.9)):
        shares = []
        for factors in KroneckerFactors.open(path).values():
            basis = factors.basis
            columns = select_staircase(basis.lam, basis.mu, energy).columns
            shares.append((float((columns > 0).double().mean()), float(columns.max()) / len(basis.mu)))
        rows.append([path, energy, *(spread(list(part)) for part in zip(*shares, strict=True))])
    return rows


def edit_large(device: str) -> None:
    """Edit one layer of a 7B model, and print what it took as JSON."""
    weight, factors = random_layer(LARGE, device)
    before = resident("VmRSS")
    if device == "cpu":
        forget_peak()  # that of making the factors
    start, edits = time.perf_counter(), []

    def work() -> None:
        edits.append(CurvatureEditor(0.85).edit_weight("fc", weight, factors, 0.85, False)[1])

    taken = peak_bytes(work) if device != "cpu" else work()
    facts = {
        "seconds": time.perf_counter() - start,
        "peak": taken or resident("VmHWM") - before,
        "stated": edit_bytes(*LARGE),
        "kept": edits[0].kept,
        "relative_change": edits[0].relative_change,
    }
    print(json.dumps(facts))


def large(device: str) -> dict[str, float]:
    """Run :func:`edit_large` in a process of its own, print what it took, and return it."""
    command = [sys.executable, __file__, "--alone", "--device", device]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        "\n{} x {}: ".format(*LARGE) + f"{facts['seconds']:.0f} s, peak {size(facts['peak'])} beyond factors and "
        f"weight (stated: {size(facts['stated'])}), {facts['kept'] / (LARGE[0] * LARGE[1]):.2%} of the pairs kept, "
        f"relative change {facts['relative_change']:.3f}"
    )
    return facts


def tables(device: str) -> dict[str, tuple[str, Callable[[int], tuple[Rows, Results]], list[str]]]:
    """Return title, work and headers of each part."""
    return {
        "selection": (
            "Selection at energy 0.9, ms",
            selection,
            ["layer", "power", "kept", "search", "sort", "heap", "sort / search", "heap / search", "same"],
        ),
        "edits": (
            "Edit at energy 0.85, s",
            partial(edits, device=device),
            ["layer", "edit", "decompositions + 4 products", "ratio"],
        ),
        "decompositions": (
            "Decomposition, s, and what other ways take of it",
            decompositions,
            ["d", "all vectors", "values alone", "10 % of vectors", "30 %", "60 %", "threads / in turn"],
        ),
        "sweep": ("Ten energies, s", sweep, ["layer", "coefficients once", "each anew", "ratio"]),
    }


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--parts", nargs="+", default=["selection", "edits", "decompositions", "sweep"])
    arguments.add_argument("--large", action="store_true", help="also edit a layer of 11008 x 4096")
    arguments.add_argument("--device", default="cpu", help="of parts edits and large")
    arguments.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers")
    arguments.add_argument("--factors", nargs="*", type=Path, default=[], help="factor files for the part needed")
    args = arguments.parse_args()
    if args.alone:
        edit_large(args.device)
        return
    results: dict[str, object] = {}
    for part, (title, work, headers) in tables(args.device).items():
        if part in args.parts:
            rows, results[title] = work(args.rounds)
            show(title, rows, headers)
    if args.factors:
        show("Eigenvectors that an edit needs", needed(args.factors), ["file", "energy", "of G", "of A"])
    if args.large:
        results["large"] = large(args.device)
    write(args.out, results)


if __name__ == "__main__":
    main()
