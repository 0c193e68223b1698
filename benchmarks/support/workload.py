"""What is timed where factors are collected: training steps and passes of a network, with and without collecting."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import collect
from lightning_curvature.recording.options import CollectorOptions

from .networks import Network

STEPS = 4  # training steps of a round
PASS = 4  # times that a pass goes over their batches

Work = Callable[[], None]


class Workload:
    """A network, its data, and the steps that are timed.

    Args:
        kind: ``"gated"``, ``"plain"`` or ``"vit"``.
        width: Of the network.
        depth: Its blocks.
        length: Tokens or patches of a row.
        rows: Rows of a batch.
        device: Of weights and data.
        dtype: Of weights and data.
    """

    def __init__(
        self,
        kind: str,
        width: int = 256,
        depth: int = 4,
        length: int = 256,
        rows: int = 4,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.model = Network(kind, width, depth, length).to(device, dtype)
        shape = (STEPS * rows, length)
        if kind == "vit":
            inputs, labels = torch.randn(*shape, 48, dtype=dtype), torch.randint(10, shape[:1])
        else:
            inputs, labels = torch.randint(2048, shape), torch.randint(2048, shape)
        inputs, labels = inputs.to(device), labels.view(STEPS * rows, -1).to(device)
        self.batches = [(x, y.flatten()) for x, y in zip(inputs.split(rows), labels.split(rows), strict=True)]
        self.num_rows, self.num_positions = len(inputs), rows * length
        self.names = [name for name, module in self.model.named_modules() if ".mlp." in name]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """The collected layers."""
        return {name: self.model.get_submodule(name) for name in self.names}

    @property
    def dims(self) -> list[int]:
        """The dimensions of the distinct factors; gate and up read one tensor."""
        dims = []
        for name, module in self.layers.items():
            dims += [module.out_features] + ([] if name.endswith("gate") else [module.in_features])
        return dims

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def step(self, batch: tuple[Tensor, Tensor], collector: Collector | None = None) -> None:
        """One training step."""
        recording = None if collector is None else collector.step(batch)
        if recording is not None:
            recording.open()
        loss = self.loss(batch)
        if recording is not None:
            recording.before_backward(loss)
            recording.stop_recording()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if recording is not None:
            recording.close()

    def plain(self) -> None:
        """Train on all batches."""
        for batch in self.batches:
            self.step(batch)

    def trained(self, **options: object) -> Work:
        """Return work that trains on all batches and collects from them."""
        collector = Collector(self.model, CollectorOptions(layers=self.names, **options))

        def work() -> None:
            for batch in self.batches:
                self.step(batch, collector)

        return work

    def naive(self) -> Work:
        """Return work that trains with the hooks that anyone would write first."""
        sums = {
            name: tuple(torch.zeros(size, size, device=m.weight.device) for size in m.weight.shape[::-1])
            for name, m in self.layers.items()
        }

        def hook(A: Tensor, G: Tensor):
            @torch.no_grad()
            def forward(_module, args, output):
                x = args[0].flatten(0, -2)
                A.add_(x.T @ x)

                def backward(gradient):
                    g = gradient.flatten(0, -2)
                    G.add_(g.T @ g)

                output.register_hook(backward)

            return forward

        def work() -> None:
            handles = [module.register_forward_hook(hook(*sums[name])) for name, module in self.layers.items()]
            self.plain()
            for handle in handles:
                handle.remove()

        return work

    def products(self) -> Work:
        """Return work that is one full matrix product of each distinct factor; a step needs half of each."""
        dims = self.dims
        data = {dim: torch.randn(self.num_positions, dim).to(self.model.place) for dim in set(dims)}

        def work() -> None:
            for _ in self.batches:
                for dim in dims:
                    data[dim].T @ data[dim]

        return work

    def bare_pass(self) -> None:
        """Go forward, and backward to the outputs of the layers, and take nothing."""
        outputs: list[Tensor] = []
        handles = [
            module.register_forward_hook(lambda *call: outputs.append(call[-1])) for module in self.layers.values()
        ]
        for batch in self.batches * PASS:
            torch.autograd.grad(self.loss(batch), outputs)
            outputs.clear()
        for handle in handles:
            handle.remove()

    def pass_over(self, fisher: str) -> None:
        """Collect in one pass over the frozen model."""
        collect(self.model, self.batches * PASS, self.loss, layers=self.names, fisher=fisher, positions="all")

    def captured_bytes(self) -> int:
        """Return the bytes of the layers' distinct inputs and of the gradients at their outputs, in one batch."""
        return self.model.place.dtype.itemsize * self.num_positions * sum(self.dims)

    def factor_bytes(self) -> int:
        """Return the bytes of the distinct factors, float32."""
        return 4 * sum(dim**2 for dim in self.dims)
