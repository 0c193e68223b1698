"""Streams of a GPU on which work runs beside the stream of the training."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_curvature.distributed import local_part


class SideStreams:
    """One side stream for each CUDA device; on other devices, work runs as usual.

    A side stream begins when the main stream has done what it was given before. The main stream waits for it only in
    :meth:`wait`.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def beside(self, tensors: Iterable[Tensor], devices: Iterable[torch.device] = ()) -> Iterator[None]:
        """Run the work of a ``with`` block on the side streams of some devices.

        Args:
            tensors: What the work reads: its devices are among them, and its memory is kept until the work is done.
            devices: Further devices.
        """
        local = [local_part(tensor) for tensor in tensors]
        on_cuda = [tensor for tensor in local if tensor.device.type == "cuda"]
        others = {device for device in devices if device.type == "cuda"}
        with ExitStack() as stack:
            for device in {tensor.device for tensor in on_cuda} | others:
                if device not in self._streams:
                    self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                side = self._streams[device]
                side.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(side))
            try:
                yield
            finally:
                for tensor in on_cuda:
                    tensor.record_stream(self._streams[tensor.device])

    def wait(self) -> None:
        """Let the main streams wait for the side streams; call it before results are used."""
        for device, side in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(side)
