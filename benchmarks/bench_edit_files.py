"""Editing a sharded folder that is larger than the memory it takes: wall time and peak resident memory.

Protocol: a random folder of 2 GB in Hugging Face's format is written, bfloat16, 8 shards, weights 2048 x 2048, with
random factors of a falling spectrum for some of its layers. In turn, three times each, separate processes (1) only
import the package, (2) copy the folder with ``shutil.copytree`` and sync it, (3) edit it, and (4) only decompose the
same factors. Peak memory is what Linux reports for the process (``VmHWM``; ``ru_maxrss`` would inherit the parent's),
beyond that of the process that only imports. Medians. Then single layers of growing width are edited, each in a process
of its own, and the memory that this takes is compared with what ``edit --dry-run`` states.

    python benchmarks/bench_edit_files.py --layers 4
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.memory import edit_bytes
from support.environment import parser
from support.measuring import show, write

DIM, SHARDS, PER_SHARD = 2048, 8, 30
REPEATS = 3

PROGRAMS = {
    "import": "",
    "copy": "import shutil, os; shutil.copytree(source, target); os.sync()",
    "edit": "CurvatureEditor(0.8).edit_checkpoint(source, KroneckerFactors.open(factors), target)",
    "decompose": "for f in KroneckerFactors.open(factors).values(): dataclasses.replace(f).basis",
}
SHAPES = ((2048, 2048), (4096, 1024), (1024, 4096), (4096, 4096))
HEADER = """
import dataclasses, sys, torch
import lightning_curvature.editing.streaming
from lightning_curvature import CurvatureEditor, KroneckerFactors

def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) / 1024

source, factors, target = sys.argv[1:]
"""
SINGLE = """
layer = KroneckerFactors.load(factors)["fc"]
weight = torch.ones(layer.shape) + layer.A.sum() + layer.G.sum()  # the factors are read before the measurement
before = peak()
CurvatureEditor(0.8).edit_weight("fc", weight, layer, 0.8, False)
print(peak() - before)
"""


def make(folder: Path, layers: int) -> None:
    """Write the folder and the factors of the first layers of its shards."""
    generator = torch.Generator().manual_seed(0)
    (folder / "model").mkdir()
    where = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {
            f"model.layers.{shard * PER_SHARD + i}.mlp.fc.weight": torch.randn(DIM, DIM, generator=generator).bfloat16()
            for i in range(PER_SHARD)
        }
        save_file(tensors, folder / "model" / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": len(where) * DIM * DIM * 2}, "weight_map": where}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    layers_factors = {
        f"model.layers.{layer * SHARDS * PER_SHARD // layers}.mlp.fc": factors(DIM, DIM, generator)
        for layer in range(layers)
    }
    KroneckerFactors(layers_factors).save(folder / "factors.safetensors")


def factors(d_out: int, d_in: int, generator: torch.Generator) -> LayerFactors:
    """Return random factors whose eigenvalues fall roughly like 1/i."""
    A, G = (
        (rows * torch.arange(1, len(rows) + 1) ** -1.0) @ rows.T / len(rows)
        for rows in (torch.randn(d, d, generator=generator) for d in (d_in, d_out))
    )
    return LayerFactors(A=A, G=G, num_inputs=10**5, num_gradients=10**5)


def single(shape: tuple[int, int]) -> float:
    """Return the MB that editing one layer takes."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "factors.safetensors")
        KroneckerFactors({"fc": factors(*shape, torch.Generator().manual_seed(0))}).save(file)
        return execute(SINGLE, Path(scratch))


def measure(program: str, folder: Path) -> tuple[float, float]:
    """Run a program in a process of its own; return seconds and peak resident MB."""
    started = time.perf_counter()
    peak = execute(f"{program}\nprint(peak())", folder)
    seconds = time.perf_counter() - started
    shutil.rmtree(folder / "target", ignore_errors=True)
    return seconds, peak


def execute(program: str, folder: Path) -> float:
    """Run a program on the model and the factors in a folder, and return the number that it prints last."""
    paths = [folder / "model", folder / "factors.safetensors", folder / "target"]
    command = [sys.executable, "-c", f"{HEADER}\n{program}", *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Run the benchmark."""
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=4, help="layers to edit, spread over the shards")
    arguments.add_argument("--out", type=Path, help="JSON file for all numbers")
    args = arguments.parse_args()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch), args.layers)
        for _ in range(REPEATS):
            for name, program in PROGRAMS.items():
                runs[name].append(measure(program, Path(scratch)))
    seconds, peak = ({name: statistics.median(run[i] for run in runs[name]) for name in runs} for i in (0, 1))
    rows = [
        [name, f"{seconds[name] - seconds['import']:.1f}", f"{peak[name] - peak['import']:.1f}"] for name in PROGRAMS
    ]
    show(f"Editing {args.layers} layers", rows, ["", "seconds beyond imports", "peak MB beyond imports"])
    edit, copy = seconds["edit"] - seconds["decompose"], seconds["copy"] - seconds["import"]
    print(f"\nEdit without its decompositions: {edit / copy:.2f} times the copy.")
    memory = {shape: single(shape) for shape in SHAPES}
    rows = [["{} x {}".format(*shape), f"{memory[shape]:.0f}", f"{edit_bytes(*shape) / 2**20:.0f}"] for shape in SHAPES]
    show("One layer:", rows, ["weight", "measured MB", "planned MB"])
    single_layers = {str(shape): megabytes for shape, megabytes in memory.items()}
    write(args.out, {"layers": args.layers, "runs": runs, "single": single_layers})


if __name__ == "__main__":
    main()
