r"""What collecting costs: time and memory, beside naive hooks and two libraries.

Protocol. Three networks: a language model with gated MLPs (gate, up, down), one with two MLP projections, and a ViT,
each with random weights and random data, float32. All MLP projections are collected. Variants take turns in rounds on
the same batches, and every figure is a ratio within a round: median, and range in brackets.

1. *in training*: forward, backward, AdamW. ``plain`` is that alone; the others add what the name says. "Extra" is the
   time beyond plain, in units of plain; "of naive" is that extra over the one of naive hooks, which add ``x.T @ x`` and
   ``g.T @ g`` of every layer to float32 sums in every step. The "limit" is the time of the products alone: one matrix
   product of each distinct factor's shapes, by half, measured in the same rounds.
2. *one pass over a frozen model*: no weight gradients, 16 batches. ``kronfluence`` and ``curvlinops`` see the same
   model, rows and layers; "sampled" draws labels from the softmax, one for each position (curvlinops:
   ``mc_samples=1``). Theirs stands beside our "sketched", too, which they do not have. The "limit" is forward and
   backward down to the layers' outputs, and the products by half, as above.
3. *memory*: the peak of four training steps beyond that of plain ones, sums included, by torch's profiler, over the
   bytes of the distinct factors in float32; captured tensors (inputs and gradients of the layers in one batch) are
   named beside it.
4. *alone*: plain, naive, ``empirical``, and watching the layers without any product, with no other variant between
   them; *blocks*: products of 1024 and 4096 rows, block columns that end at the diagonal, alone and added to a sum,
   against the full product.
5. *sizes*: the gated model at growing width, depth and sequence length: extra of ``empirical`` and of naive hooks.
6. *peak*, on a GPU: operations that one update of a factor needs (``d^2`` for each of 8192 positions, bfloat16) in a
   second, over those of one 8192 x 8192 x 8192 product of bfloat16 matrices.

    pip install -e ".[bench]"
    python benchmarks/bench_collect.py --out benchmarks/results/collect.json
    python benchmarks/bench_collect.py --device cuda --dtype bfloat16 --width 1024 --length 512 --rows 16 \
        --parts training memory peak --out benchmarks/results/collect-gpu.json
"""

import argparse
import logging
import warnings
from pathlib import Path

import torch

from support.environment import parser
from support.libraries import curvlinops_pass, kronfluence_pass
from support.measuring import extras, in_turn, peak_bytes, quotients, ratios, show, spread, write
from support.products import time_blocks, time_peak
from support.workload import PASS, Workload

Seconds = dict[str, list[float]]
Rows = list[list[object]]

KINDS = {"gated": "gated MLP", "plain": "plain MLP", "vit": "ViT"}
SIZES = (
    {},
    {"width": 128},
    {"width": 512},
    {"width": 1024, "depth": 2},
    {"depth": 2},
    {"depth": 8},
    {"length": 64, "rows": 16},
    {"length": 1024, "rows": 1},
)
"""What differs from width 256, four blocks, and four rows of 256 tokens."""


def in_training(workload: Workload, rounds: int) -> tuple[Rows, Seconds]:
    """Measure the variants of a training step."""
    seconds = in_turn(
        {
            "plain": workload.plain,
            "naive hooks": workload.naive(),
            "empirical": workload.trained(fisher="empirical"),
            "empirical, half of the positions": workload.trained(fisher="empirical", share=0.5),
            "sketched": workload.trained(fisher="sketched"),
            "sketched, its backward pass alone": workload.trained(fisher="sketched", share=1e-9),
            "sampled": workload.trained(fisher="sampled"),
            "sketched, 2 draws": workload.trained(fisher="sketched", draws=2),
            "sketched, coupled": workload.trained(fisher="sketched", coupled=True),
            "the products alone": workload.products(),
        },
        rounds,
    )
    limit = [ratio / 2 for ratio in ratios(seconds, "the products alone", "plain")]
    rows: Rows = [["limit", spread(limit), ""]]
    naive = extras(seconds, "naive hooks")
    for name in [*seconds][1:-1]:
        extra = extras(seconds, name)
        rows.append([name, spread(extra), spread(quotients(extra, naive))])
    return rows, seconds


def frozen(workload: Workload, rounds: int) -> tuple[Rows, Seconds]:
    """Measure one pass of ours and of the two libraries."""
    variants = {
        "plain": workload.plain,
        "bare": workload.bare_pass,
        "the products alone": workload.products(),
        "ours, sketched": lambda: workload.pass_over("sketched"),
    }
    for kind in ("empirical", "sampled"):
        variants[f"ours, {kind}"] = lambda kind=kind: workload.pass_over(kind)
        variants[f"kronfluence, {kind}"] = kronfluence_pass(workload, kind)
        variants[f"curvlinops, {kind}"] = lambda kind=kind: curvlinops_pass(workload, kind)
    seconds = in_turn(variants, rounds)
    parts = zip(seconds["bare"], seconds["the products alone"], strict=True)
    seconds["limit"] = [bare + PASS * products / 2 for bare, products in parts]
    rows = []
    for kind, theirs in (("empirical", "empirical"), ("sampled", "sampled"), ("sketched", "sampled")):
        names = ["limit", f"ours, {kind}", f"kronfluence, {theirs}", f"curvlinops, {theirs}"]
        of_plain = [spread([ratio / PASS for ratio in ratios(seconds, name, "plain")]) for name in names]
        of_theirs = [("limit", names[2]), (names[1], names[2]), (names[1], names[3])]
        rows.append([kind, *of_plain, *(spread(ratios(seconds, *pair)) for pair in of_theirs)])
    return rows, seconds


def memory(workload: Workload) -> tuple[Rows, dict[str, int]]:
    """Measure the peak of training on all batches, with sums that begin empty, beyond that of training alone."""
    workload.plain()
    plain = peak_bytes(workload.plain)
    rows, peaks = [], {"plain": plain, "factors": workload.factor_bytes(), "captured": workload.captured_bytes()}
    variants = {"naive hooks": lambda: workload.naive()()}
    for kind in ("empirical", "sketched"):
        variants[kind] = lambda kind=kind: workload.trained(fisher=kind)()
    for name, work in variants.items():
        peaks[name] = peak_bytes(work)
        extra = peaks[name] - plain
        over = (extra - peaks["captured"]) / peaks["factors"]
        mebibytes = [f"{size / 2**20:.1f}" for size in (plain, extra, peaks["captured"], peaks["factors"])]
        rows.append([name, *mebibytes, f"{over:.2f}"])
    return rows, peaks


def alone(workload: Workload, rounds: int) -> tuple[list[str], Seconds]:
    """Measure ``empirical`` and naive hooks with nothing else in turn."""
    seconds = in_turn(
        {
            "plain": workload.plain,
            "naive": workload.naive(),
            "ours": workload.trained(fisher="empirical"),
            "watching": workload.trained(fisher="empirical", share=1e-9),
        },
        rounds,
    )
    naive, *rest = (extras(seconds, name) for name in ("naive", "ours", "watching"))
    return [*map(spread, (naive, *rest)), *(spread(quotients(extra, naive)) for extra in rest)], seconds


def growing(rounds: int) -> tuple[Rows, dict[str, Seconds]]:
    """Measure ``empirical`` and naive hooks on gated models of several sizes."""
    rows, results = [], {}
    for sizes in SIZES:
        workload = Workload("gated", **sizes)
        seconds = in_turn(
            {
                "plain": workload.plain,
                "naive": workload.naive(),
                "limit": workload.products(),
                "ours": workload.trained(fisher="empirical"),
            },
            rounds,
        )
        naive, ours = extras(seconds, "naive"), extras(seconds, "ours")
        limit = [ratio / 2 for ratio in ratios(seconds, "limit", "plain")]
        label = {"width": 256, "depth": 4, "length": 256, "rows": 4, **sizes}
        rows.append([*label.values(), *map(spread, (limit, naive, ours, quotients(ours, naive)))])
        results[f"sizes, {label}"] = seconds
    return rows, results


def measure_kinds(args: argparse.Namespace, results: dict[str, object]) -> None:
    """Measure what is asked for on each kind of network, and print its tables."""
    shape = f"{args.width}/{4 * args.width}, {args.depth} blocks, {args.dtype}, {args.device}"
    rows_alone: Rows = []
    for kind, name in KINDS.items():
        title, dtype = f"{name}, {shape}", getattr(torch, args.dtype)
        workload = Workload(kind, args.width, args.depth, args.length, args.rows, args.device, dtype)
        if "training" in args.parts:
            rows, results[f"training, {kind}"] = in_training(workload, args.rounds)
            show(f"{title}: in training", rows, ["", "extra", "of naive"])
        if "pass" in args.parts:
            rows, results[f"pass, {kind}"] = frozen(workload, args.rounds)
            over = ["limit / kronfluence", "ours / kronfluence", "ours / curvlinops"]
            headers = ["", "limit", "ours", "kronfluence", "curvlinops", *over]
            show(f"{title}: one pass over the frozen model, training step = 1", rows, headers)
        if "memory" in args.parts:
            rows, results[f"memory, {kind}"] = memory(workload)
            headers = ["", "plain", "extra", "captured", "factors", "(extra - captured) / factors"]
            show(f"{title}: peak memory of four steps, MiB", rows, headers)
        if "alone" in args.parts:
            row, results[f"alone, {kind}"] = alone(workload, 2 * args.rounds)
            rows_alone.append([kind, *row])
        write(args.out, results)  # a run that is stopped leaves what it has
    if "alone" in args.parts:
        headers = ["", "naive", "ours", "watching", "ours / naive", "watching / naive"]
        show("empirical in every step, alone", rows_alone, headers)


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--parts", nargs="+", default=["training", "pass", "memory", "alone", "blocks", "sizes"])
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--dtype", default="float32", help="of weights and data")
    arguments.add_argument("--width", type=int, default=256, help="of parts training, pass and memory")
    arguments.add_argument("--depth", type=int, default=4, help="blocks there")
    arguments.add_argument("--length", type=int, default=256, help="tokens of a row there")
    arguments.add_argument("--rows", type=int, default=4, help="rows of a batch there")
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = arguments.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    results: dict[str, object] = {}
    measure_kinds(args, results)
    if "blocks" in args.parts:
        rows, results["blocks"] = time_blocks(2 * args.rounds)
        headers = ["positions", "width", "blocks", "block columns", "with the sum"]
        show("Products of block columns, full product = 1", rows, headers)
    if "peak" in args.parts:
        rows, results["peak"] = time_peak(args.rounds)
        headers = ["width", "ms", "TFLOP/s needed", "of the peak", "full product, of the peak"]
        show("One update of a factor, 8192 positions, bfloat16", rows, headers)
    if "sizes" in args.parts:
        rows, seconds = growing(max(args.rounds // 2, 1))
        results |= seconds
        headers = ["width", "blocks", "tokens", "rows", "limit", "naive", "ours", "ours / naive"]
        show("gated MLP, empirical in every step, growing sizes", rows, headers)
    write(args.out, results)


if __name__ == "__main__":
    main()
