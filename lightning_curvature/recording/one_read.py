"""Copies numbers of many tensors to the host in one transfer, because every transfer waits for the accelerator."""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Slot:
    """The answer to one request: empty until :meth:`OneRead.run` has read the numbers.

    Attributes:
        values: The numbers.
    """

    values: list[int] = field(default_factory=list)

    def as_float(self) -> float:
        """Return the number that :meth:`OneRead.ask_float` asked for; ``values`` holds its bits as one integer."""
        (bits,) = self.values
        return float(struct.unpack("d", struct.pack("q", bits))[0])


class OneRead:
    """Collects requests for the entries of tensors, and reads all of them in one transfer.

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
        """Ask for the number in a float64 tensor ``[]``; its bits are read as an int64, so nothing is rounded."""
        return self.ask(number.reshape(1).view(torch.int64))

    def run(self, device: torch.device) -> None:
        """Read all numbers that were asked for, and put them into their slots.

        Args:
            device: Where the numbers are joined into one tensor before they are copied to the host.
        """
        all_numbers = torch.cat([numbers.to(device, torch.int64) for _, numbers in self._asked])
        answers = iter(all_numbers.tolist())
        for slot, numbers in self._asked:
            slot.values = [next(answers) for _ in range(len(numbers))]
