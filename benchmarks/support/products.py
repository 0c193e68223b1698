"""The matrix products of an update of a factor, with no model around them."""

import itertools
import statistics

import torch

from lightning_curvature.collect.moments import SecondMoment, block_columns

from .measuring import in_turn, quotients, ratios, spread

Seconds = dict[str, list[float]]


def time_blocks(rounds: int) -> tuple[list[list[object]], dict[str, Seconds]]:
    """Measure products of block columns, and whole updates, against full products of matrices that leave the cache."""
    rows, results = [], {}
    for positions, width in itertools.product((1024, 4096), (64, 128, 256, 512, 1024, 2048, 4096)):
        data = [torch.randn(positions, width) for _ in range(max(12 * 1024**2 // (positions * width), 2))]
        bounds = block_columns(width)

        def full(data=data):
            for x in data:
                x.T @ x

        def upper(data=data, bounds=bounds):
            for x in data:
                for start, end in bounds:
                    x[:, :end].T @ x[:, start:end]

        sums = [SecondMoment(width) for _ in data]

        def update(data=data, sums=sums):
            for moment, x in zip(sums, data, strict=True):
                moment.add(x)

        seconds = in_turn({"full": full, "columns": upper, "update": update}, rounds)
        results[f"{positions} x {width}"] = seconds
        of_full = [spread(ratios(seconds, name, "full")) for name in ("columns", "update")]
        rows.append([positions, width, len(bounds), *of_full])
    return rows, results


def time_peak(rounds: int) -> tuple[list[list[object]], dict[str, Seconds]]:
    """Measure updates of one factor on a GPU against a large matrix product, both in bfloat16."""
    positions, repeats, rows, results = 8192, 20, [], {}
    square = torch.randn(8192, 8192, device="cuda").bfloat16()
    for width in (512, 1024, 2048, 4096, 8192, 11008):
        data, moment = torch.randn(positions, width, device="cuda").bfloat16(), SecondMoment(width, "cuda")
        results[str(width)] = seconds = in_turn(
            {
                "peak": lambda: [square @ square for _ in range(repeats)],
                "update": lambda x=data, m=moment: [m.add(x) for _ in range(repeats)],
                "full": lambda x=data: [torch.mm(x.T, x, out_dtype=torch.float32) for _ in range(repeats)],
            },
            rounds,
        )
        peak = [2 * 8192**3 * repeats / duration for duration in seconds["peak"]]
        needed = [width**2 * positions * repeats / duration for duration in seconds["update"]]
        full = [2 * width**2 * positions * repeats / duration for duration in seconds["full"]]
        rows.append(
            [
                width,
                f"{1000 * statistics.median(seconds['update']) / repeats:.2f}",
                f"{statistics.median(needed) / 1e12:.0f}",
                *(spread(quotients(speeds, peak)) for speeds in (needed, full)),
            ]
        )
    return rows, results
