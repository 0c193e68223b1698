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
import heapq
import itertools
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg.lapack as lapack
import torch
from measuring import in_turn, peak_bytes, ratios, spread, write
from tabulate import tabulate
from torch import Tensor

from lightning_curvature import CurvatureEditor, KroneckerFactors, LayerFactors
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.memory import edit_bytes, size

LARGE = (11008, 4096)


def covariance(dim: int, seed: int = 0) -> Tensor:
    """Return a sample covariance with a falling spectrum in a random basis, float32 ``[dim, dim]``."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(dim + dim // 2, dim, generator=generator)
    scales = torch.arange(1, dim + 1).float() ** -0.6
    moment = (rows.T @ rows / len(rows)) * torch.outer(scales, scales)
    signs = torch.randn(dim, generator=generator)
    signs /= signs.norm()
    moment -= 2 * torch.outer(signs, signs @ moment)  # a reflection on both sides, so that no axis is special
    moment -= 2 * torch.outer(moment @ signs, signs)
    return (moment + moment.T) / 2


def spectrum(dim: int, power: float) -> Tensor:
    """Return falling eigenvalues without ties, float64 ``[dim]``."""
    noise = torch.rand(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))
    return (torch.arange(1, dim + 1, dtype=torch.float64) + 0.5 * noise) ** -power


def layer(shape: tuple[int, int], device: str = "cpu") -> tuple[Tensor, LayerFactors]:
    """Return a weight ``[d_out, d_in]`` and its factors."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02
    A, G = covariance(shape[1]).to(device), covariance(shape[0], 1).to(device)
    return weight.to(device), LayerFactors(A=A, G=G, num_inputs=9, num_gradients=9)


def by_heap(lam: Tensor, mu: Tensor, energy: float) -> Tensor:
    """Take pairs in falling order from a heap; return the kept columns of each row."""
    rows, columns = lam.tolist(), mu.tolist()
    wanted, mass = energy * sum(rows) * sum(columns) * (1 - 1e-12), 0.0
    kept = [0] * len(rows)
    heap = [(-rows[0] * columns[0], 0, 0)]
    while mass < wanted:
        value, i, j = heapq.heappop(heap)
        mass -= value
        kept[i] += 1
        if j + 1 < len(columns):
            heapq.heappush(heap, (-rows[i] * columns[j + 1], i, j + 1))
        if j == 0 and i + 1 < len(rows):
            heapq.heappush(heap, (-rows[i + 1] * columns[0], i + 1, 0))
    return torch.tensor(kept)


def by_sort(lam: Tensor, mu: Tensor, energy: float) -> Tensor:
    """Sort all pairs; return the kept columns of each row."""
    mass = torch.outer(lam, mu)
    ordered = mass.flatten().sort(descending=True).values
    sums = ordered.cumsum(0)
    last = int((sums < energy * sums[-1] * (1 - 1e-12)).sum())
    return (mass >= ordered[last] * (1 - 1e-9)).sum(1)


def selection(rounds: int) -> tuple[list[list[object]], dict[str, object]]:
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


def edits(rounds: int, device: str) -> tuple[list[list[object]], dict[str, object]]:
    """Measure edits against what they cannot do without."""
    rows, results, editor = [], {}, CurvatureEditor(0.85)
    for shape in ((512, 256), (1024, 1024), (2048, 512), (512, 2048), (2048, 2048)):
        weight, factors = layer(shape, device)
        A, G, W = (tensor.double() for tensor in (factors.A, factors.G, weight))

        def edit(weight=weight, factors=factors):
            fresh = LayerFactors(A=factors.A.clone(), G=factors.G.clone(), num_inputs=9, num_gradients=9)
            editor.edit_weight("fc", weight, fresh, 0.85, False)

        def least(A=A, G=G, W=W):
            (_, U), (_, V) = torch.linalg.eigh(G), torch.linalg.eigh(A)
            U @ (U.T @ W @ V) @ V.T

        results[f"{shape}"] = seconds = in_turn({"edit": edit, "least": least}, rounds)
        times = [f"{statistics.median(own):.3f}" for own in seconds.values()]
        rows.append(["{} x {}".format(*shape), *times, spread(ratios(seconds, "edit", "least"))])
    return rows, results


def partial(matrix: np.ndarray, count: int) -> np.ndarray:
    """Return the eigenvectors of the largest eigenvalues, by one reduction and LAPACK's stemr and ormqr."""
    dim = len(matrix)
    reduced, diagonal, beside, tau, _ = lapack.dsytrd(matrix, lower=1, lwork=int(lapack.dsytrd_lwork(dim, lower=1)[0]))
    _, _, vectors, _ = lapack.dstemr(diagonal, np.append(beside, 0.0), 2, 0.0, 0.0, dim - count + 1, dim)
    vectors, reflectors = np.asfortranarray(vectors[:, :count]), np.asfortranarray(reduced[1:, :-1])
    below = np.asfortranarray(vectors[1:])
    work = int(lapack.dormqr("L", "N", reflectors, tau, below, -1)[1][0])
    vectors[1:] = lapack.dormqr("L", "N", reflectors, tau, below, work)[0]
    return vectors


def decompositions(rounds: int) -> tuple[list[list[object]], dict[str, object]]:
    """Measure ways to decompose."""
    rows, results = [], {}

    def one(matrix: Tensor) -> None:
        torch.set_num_threads(1)
        torch.linalg.eigh(matrix)

    for dim in (512, 1024, 2048):
        matrices = [covariance(dim, seed).double() for seed in range(4)]
        first = matrices[0].numpy()

        def threads(matrices=matrices):
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(one, matrices))

        results[f"{dim}"] = seconds = in_turn(
            {
                "all": lambda m=matrices: torch.linalg.eigh(m[0]),
                "values": lambda m=matrices: torch.linalg.eigvalsh(m[0]),
                "10 %": lambda m=first, d=dim: partial(m, d // 10),
                "30 %": lambda m=first, d=dim: partial(m, 3 * d // 10),
                "60 %": lambda m=first, d=dim: partial(m, 6 * d // 10),
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


def sweep(rounds: int) -> tuple[list[list[object]], dict[str, object]]:
    """Measure ten energies of one layer."""
    weight, factors = layer((2048, 512))
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


def needed(paths: list[Path]) -> list[list[object]]:
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


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def large(device: str) -> None:
    """Edit one layer of a 7B model, and print what it took."""
    weight, factors = layer(LARGE, device)
    now = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * 4096
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the factors
    start, found = time.perf_counter(), []

    def work() -> None:
        found.append(CurvatureEditor(0.85).edit_weight("fc", weight, factors, 0.85, False)[1])

    taken = peak_bytes(work) if device != "cpu" else work()
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": seconds,
                "peak": taken or peak() - now,
                "stated": edit_bytes(*LARGE),
                "kept": found[0].kept,
                "relative_change": found[0].relative_change,
            }
        )
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["selection", "edits", "decompositions", "sweep"])
    parser.add_argument("--large", action="store_true", help="also edit a layer of 11008 x 4096")
    parser.add_argument("--device", default="cpu", help="of parts edits and large")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    parser.add_argument("--factors", nargs="*", type=Path, default=[], help="factor files for the part needed")
    args = parser.parse_args()
    if args.alone:
        large(args.device)
        return
    results = {}
    for title, work, headers in (
        (
            "Selection at energy 0.9, ms",
            selection,
            ["layer", "power", "kept", "search", "sort", "heap", "sort / search", "heap / search", "same"],
        ),
        ("Edit at energy 0.85, s", edits, ["layer", "edit", "decompositions + 4 products", "ratio"]),
        (
            "Decomposition, s, and what other ways take of it",
            decompositions,
            ["d", "all vectors", "values alone", "10 % of vectors", "30 %", "60 %", "threads / in turn"],
        ),
        ("Ten energies, s", sweep, ["layer", "coefficients once", "each anew", "ratio"]),
    ):
        if work.__name__ not in args.parts:
            continue
        rows, results[title] = work(args.rounds, args.device) if work is edits else work(args.rounds)
        print(f"\n{title}\n\n{tabulate(rows, headers, tablefmt='github', disable_numparse=True)}", flush=True)
    if args.factors:
        headers = ["file", "energy", "of G", "of A"]
        print(f"\nEigenvectors that an edit needs\n\n{tabulate(needed(args.factors), headers, tablefmt='github')}")
    if args.large:
        command = [sys.executable, __file__, "--alone", "--device", args.device]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        results["large"] = found
        print(
            "\n{} x {}: ".format(*LARGE) + f"{found['seconds']:.0f} s, peak {size(found['peak'])} beyond factors and "
            f"weight (stated: {size(found['stated'])}), {found['kept'] / (LARGE[0] * LARGE[1]):.2%} of the pairs kept, "
            f"relative change {found['relative_change']:.3f}"
        )
    write(args.out, results)


if __name__ == "__main__":
    main()
