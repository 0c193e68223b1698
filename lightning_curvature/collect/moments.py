"""A streaming, mergeable second moment."""

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_RECENT = 8  # batches of a group
_LAUNCHED = 2**22  # entries of a product on a GPU, up to which starting several costs more than they save
_UNDERFLOW = 1e-30  # squares of float32 entries are lost below
_HALVES_TO_FLOAT32 = hasattr(torch.ops.aten.mm, "dtype")  # products on tensor cores; since torch 2.8
_IN_PLACE = torch.__version__ >= "2.10"  # before, addmm wanted a sum of the dtype of what it multiplies


class SecondMoment:
    """Uncentred second moment ``E[x x^T]`` of rows that arrive in batches.

    The sum has a high and a low part, both float32 (float64 for float64 rows). Matrix products are added to the low
    part. Up to eight batches are a group; after each group the low part is added to the high one, and what that loses
    by rounding stays in the low part. So a million small batches lose nothing. The moment is symmetric: of a wide one
    only block columns that end at the diagonal are computed and kept, 0.55 to 0.75 of the products and of the memory.

    Args:
        dim: Length ``d`` of a row.
        device: Where the sum lives.

    Attributes:
        dim: Length of a row.
        total: The high part: the block columns of :func:`block_columns`, one after the other.
        rest: The low part, in the same order: what the high part lost by rounding, and the last group.
        count: Positions in both parts.
        recent_count: Positions in the last group.
        recent_batches: Batches in the last group.
        dtype: Dtype of the parts and of the mean: float32, or float64 if float64 rows came in.
        groups: Groups before the last one.
        squares: Over these groups, the sum of the squared Frobenius norms of each group's sum, and the sum of the
            squared counts, float64 ``[2]``; for :meth:`relative_error`.

    >>> moment = SecondMoment(2)
    >>> moment.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> moment.mean()
    tensor([[1., 1.],
            [1., 2.]])
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.total, self.rest = (torch.zeros(packed_size(dim), dtype=torch.float32, device=device) for _ in range(2))
        self.count = self.groups = self.recent_count = self.recent_batches = 0
        self.dtype = torch.float32
        self.squares = torch.zeros(2, dtype=torch.float64, device=device)
        self._mean: Callable[[], Tensor | None] = lambda: None

    @torch.no_grad()
    def add(self, *rows: Tensor, count: int | None = None, scale: float = 1.0) -> None:
        """Add one batch. Call it inside :func:`full_precision` where torch may take products in fewer bits.

        Args:
            *rows: Rows ``[n, d]``, any floating dtype. The products of several are summed; without any, only the count
                grows.
            count: Number of positions that are added; by default the number of all rows.
            scale: Factor of the products.
        """
        count = sum(len(part) for part in rows) if count is None else count
        self.count += count
        self.recent_count += count
        self.recent_batches += 1
        if filled := [part for part in rows if len(part)]:  # the expert of a mixture may see no position of a batch
            self._add_products(filled, scale)
        # The first groups are small, so that a few batches can tell of their spread.
        if self.recent_batches >= min(max(self.groups, 1), _RECENT):
            self.settle()
        self._mean = lambda: None

    def _add_products(self, rows: Sequence[Tensor], scale: float) -> None:
        self._promote(*(part.dtype for part in rows))
        single = self.dtype == torch.float32
        operands = [part if single and _on_tensor_cores(part) else part.to(self.dtype) for part in rows]
        blocks = list(self._blocks(self.rest))
        if len(blocks) > 1 and _in_one_product(rows[0], self.dim):
            product = self._product(operands, 0, self.dim, scale)
            for start, end, block in blocks:
                block += product[:end, start:end]
            return
        for start, end, block in blocks:
            if _lie_together(block, rows[0]):
                for part in operands:
                    _add_product(block, part[:, :end].T, part[:, start:end], scale)
            else:
                block += self._product(operands, start, end, scale)

    def _product(self, operands: Sequence[Tensor], start: int, end: int, scale: float) -> Tensor:
        """Return the block column ``start:end`` of the products, rows up to ``end``, on the device of the sums."""
        product = torch.empty(end, end - start, dtype=self.dtype, device=operands[0].device)
        for index, part in enumerate(operands):
            _add_product(product, part[:, :end].T, part[:, start:end], scale, beta=min(index, 1))
        return product.to(self.rest.device)

    def _promote(self, *dtypes: torch.dtype) -> None:
        if torch.float64 in dtypes and self.dtype == torch.float32:
            self.dtype = torch.float64
            self.total, self.rest = self.total.double(), self.rest.double()

    def settle(self) -> None:
        """Add the last group to the high part, and begin a new group."""
        if not self.recent_batches:
            return
        self.squares[0] += self._square_norm(self.rest)
        self.squares[1] += float(self.recent_count) ** 2
        self.groups += 1
        if self.count == self.recent_count:
            self.total, self.rest = self.rest, self.total  # the high part is zero
        else:
            whole = self.total + self.rest
            self.rest += self.total.sub_(whole)  # what rounding lost (Dekker 1971, Fast2Sum)
            self.total = whole
        self.recent_count = self.recent_batches = 0

    def double(self) -> Tensor:
        """Return the sum of both parts in float64, packed."""
        return self.total.double() + self.rest

    def set_double(self, whole: Tensor, dtype: torch.dtype) -> None:
        """Set both parts from a packed float64 sum.

        Args:
            whole: The sum.
            dtype: Dtype of the parts.
        """
        self.dtype, self.total = dtype, whole.to(dtype)
        self.rest = (whole - self.total).to(dtype)

    def settled(self) -> "SecondMoment":
        """Return the same moment with its last group in the high part; this one is not changed."""
        if not self.recent_batches:
            return self
        settled = copy.copy(self)
        settled.total, settled.rest, settled.squares = (x.clone() for x in (self.total, self.rest, self.squares))
        settled.settle()
        return settled

    def merge_(self, other: "SecondMoment") -> None:
        """Add the sum of other positions."""
        self.settle()
        other = other.settled()
        whole = self.double() + other.double().to(self.total.device)
        self.set_double(whole, torch.promote_types(self.dtype, other.dtype))
        self.squares += other.squares.to(self.squares.device)
        self.count += other.count
        self.groups += other.groups
        self._mean = lambda: None

    def mean(self) -> Tensor:
        """Return the moment ``[d, d]`` in float32, or float64 if float64 rows came in; zeros if none did.

        Layers that are tied to this moment get one tensor: as long as it is in use and nothing is added, it is returned
        again.
        """
        mean = self._mean()
        if mean is None:
            mean = torch.empty(self.dim, self.dim, dtype=self.dtype, device=self.total.device)
            for (start, end, high), (_, _, low) in zip(self._blocks(self.total), self._blocks(self.rest), strict=True):
                mean[:end, start:end] = (high.double() + low) / max(self.count, 1)
                mean[start:end, :start] = mean[:start, start:end].T
            self._mean = weakref.ref(mean)
        return mean

    def copy(self) -> "SecondMoment":
        """Return a copy, to which other rows can be added."""
        return self.part(self.count, self.groups)

    def part(self, count: int, groups: int) -> "SecondMoment":
        """Return the fraction of the sum that stands for some of its positions and groups."""
        part, share = copy.copy(self.settled()), count / max(self.count, 1)
        part.set_double(part.double() * share, part.dtype)
        part.squares = part.squares * share
        part.count, part.groups = count, groups
        part._mean = lambda: None
        return part

    def move(self, device: torch.device) -> None:
        """Move the sum to a device."""
        if self.total.device == device:
            return
        self.total, self.rest, self.squares = (x.to(device) for x in (self.total, self.rest, self.squares))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that :meth:`from_state_dict` needs, as tensors and primitives."""
        state = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {**state, "dtype": str(self.dtype)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> "SecondMoment":
        """Return the moment that :meth:`state_dict` was taken from, on the device of its tensors."""
        moment = cls(state["dim"], "meta")
        vars(moment).update(state, dtype=getattr(torch, state["dtype"].removeprefix("torch.")))
        return moment

    @classmethod
    def of(cls, mean: Tensor, count: int, error: float | None = None) -> "SecondMoment":
        """Return the moment that has a mean ``[d, d]``, a count, and a :meth:`relative_error`."""
        moment = cls(len(mean), mean.device)
        columns = [mean[:end, start:end].double().flatten() * count for start, end in block_columns(len(mean))]
        moment.set_double(torch.cat(columns), mean.dtype)
        moment.count = count
        # Its groups are not known: as if they were many and small.
        moment.squares[0] = math.nan if error is None else error**2 * moment._square_norm(moment.total)
        return moment

    def relative_error(self) -> float | None:
        """Return the standard error of the mean, relative to its Frobenius norm; None if its batches cannot tell.

        The groups are taken for independent. Let ``S`` be the sum, ``V`` the variance of its entries, summed, and ``q``
        the sum of the groups' squared shares of the positions. Then the squared norms of the groups' sums add up to
        ``q |E S|^2 + V``, and ``|S|^2`` is ``|E S|^2 + V``, in expectation, which tells ``V``.
        """
        settled = self.settled()
        whole, (squares, counts) = float(self._square_norm(settled.total)), settled.squares.tolist()
        q = counts / max(self.count, 1) ** 2
        if not (q < 1 and whole > 0 and _UNDERFLOW < squares < math.inf):
            return None
        return math.sqrt(max(squares / whole - q, 0.0) / (1.0 - q))

    def _square_norm(self, packed: Tensor) -> Tensor:
        """Return the squared Frobenius norm, float64, of a matrix given by its block columns.

        Entries beside the diagonal blocks stand for two entries of the symmetric matrix.
        """
        diagonal = torch.cat([block[start:].flatten() for start, _, block in self._blocks(packed)])
        whole, once = (torch.linalg.vector_norm(part).double() for part in (packed, diagonal))
        norm: Tensor = 2 * whole * whole - once * once
        return norm

    def _blocks(self, packed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield each block column as its first column, its last column plus one, and its entries."""
        offset = 0
        for start, end in block_columns(self.dim):
            size = (end - start) * end
            yield start, end, packed[offset : offset + size].view(end, end - start)
            offset += size


def block_columns(dim: int) -> list[tuple[int, int]]:
    """Return the bounds of the block columns that are kept of a symmetric matrix.

    Of the columns ``start:end`` the rows ``:end`` are kept. A block is a quarter of the matrix wide, at least 128 and
    at most 1024 columns: narrower blocks are slow, wider ones take more products. See ``docs/performance.md``.

    >>> block_columns(300)
    [(0, 128), (128, 256), (256, 300)]
    """
    width = min(max(64 * -(-dim // 256), 128), 1024)
    return [(start, min(start + width, dim)) for start in range(0, dim, width)]


def packed_size(dim: int) -> int:
    """Return the number of entries that are kept of a symmetric matrix.

    >>> packed_size(1024) / 1024**2
    0.625
    """
    return sum((end - start) * end for start, end in block_columns(dim))


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float, beta: int = 1) -> None:
    """Add a product to a matrix without another matrix of its size; with ``beta=0``, write the product over it."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=beta, alpha=scale, out=total)
    elif _IN_PLACE:  # products of halves are exact in float32
        torch.addmm(total, left, right, out_dtype=torch.float32, beta=beta, alpha=scale, out=total)
    else:
        product = torch.mm(left, right, out_dtype=torch.float32).mul_(scale)
        total.add_(product) if beta else total.copy_(product)


def _in_one_product(rows: Tensor, dim: int) -> bool:
    return rows.is_cuda and dim * dim <= _LAUNCHED


def _lie_together(block: Tensor, rows: Tensor) -> bool:
    return block.device == rows.device


def _on_tensor_cores(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype.itemsize == 2 and _HALVES_TO_FLOAT32
