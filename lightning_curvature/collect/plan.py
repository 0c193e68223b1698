"""How much memory the sums of a collection take, and where they live; worked out before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_curvature._groups import grouped
from lightning_curvature.collect.moments import packed_size
from lightning_curvature.memory import free_memory, size

_SUM, _FACTOR = 8, 4  # bytes of an entry: sums have two float32 parts, finished factors one


class DoesNotFitError(RuntimeError):
    """A collection needs more memory than there is."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the factors of some layers.

    Args:
        layers: Shape ``(d_out, d_in)`` of each layer's weight.
        device: Where the sums will live.

    Example:
        >>> plan = MemoryPlan({"mlp.down_proj": (4096, 11008)}, torch.device("cpu"))
        >>> print(plan)
        Memory of the K-FAC factors of 1 layer, on cpu (A: [d_in, d_in], G: [d_out, d_out]):
          mlp.down_proj  4096 x 11008  1.08 GiB
          together 1.08 GiB: 0.57 GiB of sums (upper blocks, twice float32), 0.51 GiB of finished factors (float32)
        Layers that read the same tensor have one A, and need less.
    """

    layers: Mapping[str, tuple[int, int]]
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """Bytes of sums and finished factors together."""
        return sum(map(sum, self._bytes.values()))

    @property
    def _bytes(self) -> dict[str, tuple[int, int]]:
        """Bytes of the sums and of the factors of each layer."""
        return {
            name: (sum(_SUM * packed_size(dim) for dim in shape), sum(_FACTOR * dim**2 for dim in shape))
            for name, shape in self.layers.items()
        }

    def __str__(self) -> str:
        lines = grouped(self.layers)
        width, rows = max(map(len, lines), default=0), []
        for title, names in lines.items():
            shape = " x ".join(map(str, self.layers[names[0]]))
            taken = size(sum(sum(self._bytes[name]) for name in names))
            rows.append(f"  {title:<{width}}  {f'{len(names)} x ' if len(names) > 1 else ''}{shape}  {taken}")
        table = "\n".join(rows)
        sums, factors = (sum(part) for part in zip(*self._bytes.values(), strict=True))
        return (
            f"Memory of the K-FAC factors of {len(self.layers)} layer{'s' * (len(self.layers) != 1)}, on {self.device} "
            f"(A: [d_in, d_in], G: [d_out, d_out]):\n{table}\n  together {size(self.num_bytes)}: "
            f"{size(sums)} of sums (upper blocks, twice float32), {size(factors)} of finished factors (float32)\n"
            "Layers that read the same tensor have one A, and need less."
        )

    def check(self, available: int | None = None) -> None:
        """Raise if the device has too little memory left.

        Args:
            available: Free bytes; by default what the device reports.

        Raises:
            DoesNotFitError: If the factors do not fit; says what to do.
        """
        free = free_memory(self.device) if available is None else available
        if self.num_bytes > free:
            cpu = "" if self.device.type == "cpu" else ", accumulate on the CPU (accumulate_on='cpu')"
            raise DoesNotFitError(
                f"{self}\n{self.device} has {size(free)} left: that does not fit. Choose fewer layers (layers=){cpu}, "
                "or collect the layers in groups, one pass over the data each (lightning-curvature collect --passes)."
            )


def place_sums(layers: Mapping[str, tuple[int, int]], device: torch.device, accumulate_on: str) -> torch.device:
    """Return where the sums of the layers on a device live; say what they take.

    Args:
        layers: Shape ``(d_out, d_in)`` of the weight of each layer.
        device: Where the layers are.
        accumulate_on: ``"model"``, ``"cpu"``, or ``"auto"``: there if they fit, and otherwise on the CPU.

    Raises:
        DoesNotFitError: If they fit nowhere.
    """
    cpu = torch.device("cpu")
    plan = MemoryPlan(layers, cpu if accumulate_on == "cpu" or device.type == "mps" else device)  # MPS has no float64
    if layers:
        if accumulate_on == "auto" and plan.device != cpu and plan.num_bytes > free_memory(device):
            rank_zero_info(f"{plan}\nThat does not fit there: they are summed on the CPU.")
            plan = MemoryPlan(layers, cpu)
        rank_zero_info(str(plan))
        plan.check()
    return plan.device
