"""What an edit takes, of memory and of time, and where it runs."""

import psutil
import torch

_GPU_FACTOR = 2
"""An edit runs on a GPU that has this many times the bytes free that it takes on the CPU ..."""
_LIBRARY_BYTES = 2**28
"""... and this many more, for the libraries."""


def edit_bytes(d_out: int, d_in: int) -> int:
    """Return the bytes that editing one layer takes: the larger of decomposing a factor and projecting the weight.

    All arrays are float64. The eigendecomposition of the second factor, ``[d, d]``, holds at most the matrix, its
    eigenvectors, a sorted copy and a workspace of twice its size, besides the basis of the first factor. A projection
    holds both bases and three arrays of the weight's size. ``benchmarks/bench_edit_files.py`` measures 0.8 to 1.0 times
    this, and up to 1.2 times on a GPU.

    Args:
        d_out: Rows of the weight.
        d_in: Columns of the weight.
    """
    small, large = sorted((d_out, d_in))
    return 8 * max(small**2 + 5 * large**2, small**2 + large**2 + 3 * small * large)


def place_edit(weight: torch.device, factors: torch.device, shape: tuple[int, int]) -> torch.device:
    """Return the device on which a layer is decomposed and edited.

    That is where its factors are, except that factors on the CPU move to the GPU of the weight if it has room.

    Args:
        weight: Device of its weight.
        factors: Device of its factors.
        shape: Shape ``(d_out, d_in)`` of the weight.
    """
    if weight.type != "cuda" or factors.type != "cpu":
        return factors
    return weight if _GPU_FACTOR * edit_bytes(*shape) + _LIBRARY_BYTES <= free_memory(weight) else factors


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that are free on a device; on a GPU with the unused cache of torch."""
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
    """Return a guess of the seconds that editing one layer takes, right within a factor of a few.

    The two eigendecompositions dominate, cubic in the widths: two cores decompose a factor of width 1000 in a second,
    a GPU is ten times as fast.
    """
    return (d_out**3 + d_in**3) / (1e10 if on_gpu else 1e9)


def training_seconds(num_products: float, num_steps: int, on_gpu: bool) -> float:
    """Return a guess of the seconds that a training takes, right within a factor of a few.

    It is the same on a busy and on an idle machine, so that a choice which depends on it is the same, too. A training
    step takes three products of each weight with the positions, and two milliseconds of Lightning's own.

    Args:
        num_products: Multiplications of one pass forward through all linear layers, of all steps.
        num_steps: Number of training batches.
        on_gpu: Whether a GPU trains.
    """
    return 3 * num_products / (1e13 if on_gpu else 1e10) + 0.002 * num_steps
