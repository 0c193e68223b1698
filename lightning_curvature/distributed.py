"""The processes of a run: whose data are whose, which layers each one edits, and what they tell each other.

Every method that talks to the others is a *collective*: all processes call it, in the same order. A failure on one
process is told to all, and all of them raise it: none waits for one that has given up.
"""

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from traceback import clear_frames
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

_TOLD = (ValueError, RuntimeError, OSError)
"""What is caught on one process, and raised on all."""


class Ranks:
    """The processes of a run, seen from one of them; by default this one alone, with which nothing is ever sent.

    Attributes:
        rank: Index of this process.
        size: Number of processes.
        data: Index of the part of the data that this process sees.
        num_data: Number of such parts.
        is_counted: Whether this process counts what it sees; of those that see the same data, one does.
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
        """Return the processes of the running process group; this one alone if there is none. A collective.

        Args:
            data: Index of the part of the data that this process sees. Processes with one index (a tensor-parallel
                group) see the same data.
            num_data: Number of such parts.
            device: Where tensors must lie to be sent.
        """
        ranks = cls()
        ranks.device = device
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            ranks.rank, ranks.size = dist.get_rank(), dist.get_world_size()
            ranks.data, ranks.num_data = data, num_data
            # Its own group: what is sent here never mixes with what others send, whatever runs in between.
            ranks._group = ranks._control = dist.new_group()
            if dist.get_backend() != "gloo":
                ranks._control = dist.new_group(backend="gloo")
            ranks.is_counted = ranks.gather(data).index(data) == ranks.rank
        return ranks

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in their order; values are pickled, so they must be small."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def all_here(self, seconds: float = 10.0) -> bool:
        """Tell whether all processes call this within some seconds, where a failed one may have gone its own way."""
        if self.size == 1:
            return True
        try:
            dist.monitored_barrier(self._control, timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError:
            return False
        return True

    def first(self, work: Callable[[], T]) -> T:
        """Return what work returns on the first process; the others do not run it."""
        return self.on(0, work)

    def on(self, owner: int, work: Callable[[], T]) -> T:
        """Return what work returns on one process; the others do not run it.

        Raises:
            ValueError: What work raised, as are the next two.
            RuntimeError: As above.
            OSError: As above.
        """
        if self.size == 1:
            return work()
        found: Any = [None, None]
        if self.rank == owner:
            try:
                found[0] = work()
            except _TOLD as error:
                found[1] = error
        dist.broadcast_object_list(found, src=owner, group=self._group)
        if found[1] is not None:
            raise found[1]
        return found[0]  # type: ignore[no-any-return]

    def sum(self, tensor: Tensor, to: int | None = None) -> Tensor:
        """Return the sum of the tensors of all processes, of one shape and dtype, where the tensor was.

        Args:
            tensor: What this process adds.
            to: The only process that needs the result; what the others get means nothing. None for all.
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
        """Return the tensor of one process on all of them; the others give None, and receive it on the device."""
        if self.size == 1 and tensor is not None:
            return tensor
        kind = self.on(owner, lambda: (tensor.shape, tensor.dtype) if tensor is not None else None)
        if kind is None:
            raise RuntimeError(f"Process {owner} has no tensor to send.")
        sent = torch.empty(*kind[:1], dtype=kind[1], device=self.device) if tensor is None else tensor
        sent = sent.detach().to(self.device).contiguous()
        dist.broadcast(sent, src=owner, group=self._group)
        return sent if tensor is None else tensor

    def owners(self, sizes: Mapping[str, float]) -> dict[str, int]:
        """Spread pieces of work over the processes, the largest first, each to the one with the least to do.

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
            names: Names of all of them, the same on all processes.
            work: Those of this process, each of which returns a tensor and something small.
            owners: By name, whose it is.

        Returns:
            By name what it returned, or the ``ValueError`` that it raised.

        Raises:
            RuntimeError: What a piece of work raised.
        """
        done: dict[str, Any] = {}
        for name, do in work.items():
            try:
                done[name] = do()
            except _TOLD as error:
                done[name] = error
                for failed in filter(None, (error, error.__cause__)):  # their frames hold the tensors of the work
                    clear_frames(failed.__traceback__)
        told: dict[str, Any] = {}
        for part in self.gather({name: r if isinstance(r, Exception) else r[1] for name, r in done.items()}):
            told |= part
        errors = [found for found in told.values() if isinstance(found, Exception)]
        fatal = [error for error in errors if not isinstance(error, ValueError)]
        if fatal:
            raise fatal[0]
        results: dict[str, tuple[Tensor, T] | ValueError] = {}
        for name in names:
            if isinstance(told[name], ValueError):
                results[name] = told[name]
            else:
                own = done[name][0] if name in done else None
                results[name] = (self.send(own, owners[name]), told[name])
        return results

    def part(self, count: int) -> int:
        """Return this process's part of a count; the parts of the processes that are counted sum to it.

        >>> Ranks().part(7)
        7
        """
        if not self.is_counted:
            return 0
        return count // self.num_data + (self.data < count % self.num_data)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as a plain, dense one. A collective where it is spread over processes (a ``DTensor``).

    Rows of several lengths (a nested tensor) come one after the other, ``[n, ...]``. A sharded state dict may lie on
    the CPU, where its processes cannot send it.
    """
    if tensor.is_nested:
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in tensor.unbind()])
    if tensor.layout != torch.strided:
        return tensor.to_dense()
    if not hasattr(tensor, "full_tensor"):
        return tensor
    spread: Any = tensor
    return spread.to(spread.device_mesh.device_type).full_tensor()  # type: ignore[no-any-return]


def spread_like(tensor: Tensor, original: Tensor) -> Tensor:
    """Return a plain tensor, the same on all processes, spread as another one of its shape is."""
    if not hasattr(original, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    as_it: Any = original
    mesh = as_it.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, as_it.placements).to(original.device)
