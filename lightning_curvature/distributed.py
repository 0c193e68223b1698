"""The processes of a run: which data each one sees, which layers each one edits, and what they send to each other.

Every method that communicates is a *collective*: all processes call it, in the same order. If work fails on one
process, all processes raise its error, so that no process waits for one that has given up.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

_SENT_ERRORS = (ValueError, RuntimeError, OSError)
"""Errors that are caught on one process, sent, and raised on all."""


class Ranks:
    """The processes of a run, seen from one of them; by default this process alone, and then nothing is ever sent.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
        data: Index of the part of the data that this process sees.
        num_data: Number of such parts.
        is_counted: Whether this process counts the data that it sees. Of several processes that see the same data
            (a tensor-parallel group), only the first does.
        device: Where tensors must lie to be sent.
    """

    rank, size, is_counted = 0, 1, True

    def __init__(self) -> None:
        self.data, self.num_data = 0, 1
        self.device = torch.device("cpu")
        self._group: Any = None
        self._control: Any = None

    @classmethod
    def of_run(cls, data: int, num_data: int, device: torch.device) -> "Ranks":
        """Return the processes of the running process group; this process alone if there is none. A collective.

        Args:
            data: Index of the part of the data that this process sees; the same for all processes that see the same
                data (a tensor-parallel group).
            num_data: Number of such parts.
            device: Where tensors must lie to be sent.
        """
        ranks = cls()
        ranks.device = device
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            ranks.rank, ranks.size = dist.get_rank(), dist.get_world_size()
            ranks.data, ranks.num_data = data, num_data
            # A group of its own: messages never mix with those of other code, whatever runs in between.
            ranks._group = ranks._control = dist.new_group()
            if dist.get_backend() != "gloo":
                ranks._control = dist.new_group(backend="gloo")
            ranks.is_counted = ranks.gather(data).index(data) == ranks.rank
        return ranks

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of ranks; values are pickled, so they must be small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def all_here(self, seconds: float = 10.0) -> bool:
        """Tell whether all processes call this within some seconds; after a failure some may never do."""
        if self.size == 1:
            return True
        try:
            dist.monitored_barrier(self._control, timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError:
            return False
        return True

    def first(self, work: Callable[[], T]) -> T:
        """Return what a function returns on the first process; the other processes do not call it."""
        return self.on(0, work)

    def on(self, owner: int, work: Callable[[], T]) -> T:
        """Return what a function returns on one process; the other processes do not call it.

        Args:
            owner: Rank of the process that calls it.
            work: The function; what it returns is pickled, so it must be small.

        Raises:
            ValueError: If ``work`` raises one, as the next two.
            RuntimeError: As above.
            OSError: As above.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]  # what was returned, and what was raised
        if self.rank == owner:
            try:
                outcome[0] = work()
            except _SENT_ERRORS as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=owner, group=self._group)
        failure = outcome[1]
        if failure is not None:
            raise failure
        result: T = outcome[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Return what a function returns on this process, each of which calls it.

        Raises:
            RuntimeError: If it raises anything on one of several processes, on all; alone it raises what it raises.
        """
        if self.size == 1:
            return work()
        failure = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  # told to all: none waits for one that has given up
            failure = f"{type(error).__name__}: {error}"
        if failures := [reason for reason in self.gather(failure) if reason]:
            raise RuntimeError(failures[0])
        return result

    def sum(self, tensor: Tensor, to: int | None = None) -> Tensor:
        """Return the sum of the tensors of all processes, on the device of this process's tensor.

        Args:
            tensor: The summand of this process; of one shape and dtype on all.
            to: Rank of the only process that needs the sum; the result of the others is undefined. None for all.
        """
        if self.size == 1:
            return tensor
        sent = tensor.to(self.device, copy=True).contiguous()
        if to is None:
            dist.all_reduce(sent, group=self._group)
        else:
            dist.reduce(sent, dst=to, group=self._group)
        return sent.to(tensor.device)

    def send(self, tensor: Tensor | None, owner: int) -> Tensor:
        """Return the tensor of one process on all of them.

        Args:
            tensor: The tensor on its owner, which gets it back; None on the other processes, which receive it on
                ``device``.
            owner: Rank of the process that has it.

        Raises:
            RuntimeError: If the owner gives None.
        """
        if self.size == 1 and tensor is not None:
            return tensor
        kind = self.on(owner, lambda: (tensor.shape, tensor.dtype) if tensor is not None else None)
        if kind is None:
            raise RuntimeError(f"Process {owner} has no tensor to send.")
        shape, dtype = kind
        sent = torch.empty(shape, dtype=dtype, device=self.device) if tensor is None else tensor
        sent = sent.detach().to(self.device).contiguous()
        dist.broadcast(sent, src=owner, group=self._group)
        return sent if tensor is None else tensor

    def owners(self, sizes: Mapping[str, float]) -> dict[str, int]:
        """Return a process for each piece of work: the largest piece first, each to the one with the least to do.

        Args:
            sizes: Size of each piece, by name.

        >>> Ranks().owners({"fc1": 8.0, "fc2": 2.0})
        {'fc1': 0, 'fc2': 0}
        """
        load = [0.0] * self.size
        owners = {}
        for name in sorted(sizes, key=lambda name: -sizes[name]):
            owners[name] = load.index(min(load))
            load[owners[name]] += sizes[name]
        return owners

    def spread(
        self, names: Iterable[str], work: Mapping[str, Callable[[], tuple[Tensor, T]]], owners: Mapping[str, int]
    ) -> dict[str, tuple[Tensor, T] | ValueError]:
        """Run each piece of work on its owner, and return all results everywhere.

        Args:
            names: Names of all pieces, the same on all processes.
            work: The pieces of this process, by name; each returns a tensor, and facts that are small.
            owners: Rank of the process that runs each piece.

        Returns:
            By name what the piece returned, or the ``ValueError`` that it raised.

        Raises:
            RuntimeError: If a piece of work raises one.
            OSError: As above.
        """
        tensors: dict[str, Tensor] = {}
        outcomes: dict[str, Any] = {}  # the facts of each piece of this process, or its error
        for name, run in work.items():
            try:
                tensors[name], outcomes[name] = run()
            except _SENT_ERRORS as error:
                outcomes[name] = error
                for failed in filter(None, (error, error.__cause__)):  # their frames hold the tensors of the work
                    clear_frames(failed.__traceback__)
        gathered: dict[str, Any] = {}  # in the same order on all processes, which raise the same error
        for part in self.gather(outcomes):
            gathered |= part
        errors = [outcome for outcome in gathered.values() if isinstance(outcome, Exception)]
        fatal = [error for error in errors if not isinstance(error, ValueError)]
        if fatal:
            raise fatal[0]
        results: dict[str, tuple[Tensor, T] | ValueError] = {}
        for name in names:
            outcome = gathered[name]
            if isinstance(outcome, ValueError):
                results[name] = outcome
            else:
                results[name] = (self.send(tensors.get(name), owners[name]), outcome)
        return results

    def part(self, count: int) -> int:
        """Return this process's part of a count; the parts of all processes sum to the count.

        >>> Ranks().part(7)
        7
        """
        if not self.is_counted:
            return 0
        return count // self.num_data + (self.data < count % self.num_data)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as a plain, dense one. A collective if it is sharded over processes (a ``DTensor``).

    Rows of several lengths (a nested tensor) come one after the other, ``[n, d]``.
    """
    if tensor.is_nested:
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in tensor.unbind()])
    if tensor.layout != torch.strided:
        return tensor.to_dense()
    if not hasattr(tensor, "full_tensor"):
        return tensor
    sharded: Any = tensor
    # A sharded state dict may lie on the CPU, from where its processes cannot send it.
    full: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return full


def local_part(tensor: Any) -> Any:
    """Return this process's part of a sharded tensor (a ``DTensor``); any other tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def spread_like(tensor: Tensor, original: Tensor) -> Tensor:
    """Shard a plain tensor, which is the same on all processes, as a tensor of the same shape is sharded."""
    if not hasattr(original, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = original
    mesh = sharded.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, sharded.placements).to(original.device)
