"""The kept pairs of an energy, chosen in the two ways that come to mind first."""

import heapq

import torch
from torch import Tensor


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
