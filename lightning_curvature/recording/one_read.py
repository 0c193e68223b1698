"""Numbers of many tensors, read from their device at once: each read waits for an accelerator."""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Slot:
    """The place of numbers that were asked for.

    Attributes:
        values: The numbers, once :meth:`OneRead.run` has read them.
    """

    values: list[int] = field(default_factory=list)

    def as_float(self) -> float:
        """Return the one number, which was asked for as a float64."""
        (bits,) = self.values
        return float(struct.unpack("d", struct.pack("q", bits))[0])


class OneRead:
    """Collects what is asked of tensors, and reads all of it at once.

    >>> read = OneRead()
    >>> count, half = read.ask(torch.tensor([3, 4])), read.ask_float(torch.tensor(0.5, dtype=torch.float64))
    >>> read.run(torch.device("cpu"))
    >>> count.values, half.as_float()
    ([3, 4], 0.5)
    """

    def __init__(self) -> None:
        self._asked: list[tuple[Slot, Tensor]] = []

    def ask(self, numbers: Tensor) -> Slot:
        """Ask for the entries of a tensor of integers or bools, ``[n]``."""
        slot = Slot()
        self._asked.append((slot, numbers))
        return slot

    def ask_float(self, number: Tensor) -> Slot:
        """Ask for a number, float64 ``[]``, bit for bit."""
        return self.ask(number.reshape(1).view(torch.int64))

    def run(self, device: torch.device) -> None:
        """Read everything that was asked for; it is brought together on a device."""
        together = torch.cat([numbers.to(device, torch.int64) for _, numbers in self._asked])
        answers = iter(together.tolist())
        for slot, numbers in self._asked:
            slot.values = [next(answers) for _ in range(len(numbers))]
