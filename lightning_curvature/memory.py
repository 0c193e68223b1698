"""Bytes of memory: how much is free, what an edit takes, and where it runs."""

import psutil
import torch

_ROOM, _LIBRARIES = 2, 2**28  # free on a GPU for an edit: times what it takes on the CPU, and bytes for the libraries


def edit_bytes(d_out: int, d_in: int) -> int:
    """Return the bytes that editing one layer takes: the larger of decomposing a factor and projecting the weight.

    All in float64. An eigendecomposition of ``[d, d]`` holds at most the matrix, its vectors, a sorted copy and a
    workspace of twice its size, besides the basis that is done; a projection holds both bases and three arrays of the
    weight's size. ``benchmarks/bench_edit_files.py`` measures 0.8 to 1.0 times this; on a GPU it is up to 1.2 times.
    """
    small, large = sorted((d_out, d_in))
    return 8 * max(small**2 + 5 * large**2, small**2 + large**2 + 3 * small * large)


def place_edit(weight: torch.device, factors: torch.device, shape: tuple[int, int]) -> torch.device:
    """Return where a layer is decomposed and edited: on a GPU that holds its factors, or its weight if there is room.

    Args:
        weight: Where its weight is.
        factors: Where its factors are.
        shape: Shape ``(d_out, d_in)`` of the weight.
    """
    if weight.type != "cuda" or factors.type != "cpu":
        return factors
    return weight if _ROOM * edit_bytes(*shape) + _LIBRARIES <= free_memory(weight) else factors


def free_memory(device: torch.device) -> int:
    """Return the bytes that a device has left."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return int(psutil.virtual_memory().available)


def size(num_bytes: int) -> str:
    """Return a number of bytes as text.

    >>> size(3 * 2**29)
    '1.50 GiB'
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= 0.1 * scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes / 2**10:.1f} KiB"


def edit_seconds(d_out: int, d_in: int, on_gpu: bool) -> float:
    """Return about how long editing one layer takes: its two eigendecompositions, cubic in the widths.

    A guess from the shapes alone, right within a factor of a few: two cores decompose a factor of width 1000 in a
    second, a GPU ten times as fast.
    """
    return (d_out**3 + d_in**3) / (1e10 if on_gpu else 1e9)
