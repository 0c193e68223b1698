"""Streams of an accelerator that run beside the one on which training runs."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStreams:
    """One stream beside the main one for each CUDA device; on other devices, work runs where it always does.

    Work beside starts when what the main stream has been given before is done; the main stream does not wait for it
    until :meth:`wait`.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    @contextmanager
    def beside(self, tensors: Iterable[Tensor], devices: Iterable[torch.device] = ()) -> Iterator[None]:
        """Run the work of a ``with`` block beside the main stream of each device that its input lies on, and of others.

        Args:
            tensors: The input. Its memory is not used again before that work is done.
            devices: Others.
        """
        local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
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
        """Let the main streams wait for the work beside them; call before its results are used."""
        for device, side in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(side)
