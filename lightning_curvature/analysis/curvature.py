r"""Curvature of the loss along directions of the weights, by products: no matrix is formed.

For logits ``z`` with softmax ``p``, averaged over loss positions,

.. math:: v^\top \mathrm{GGN}\, v = (J v)^\top (\mathrm{diag}(p) - p p^\top)(J v), \qquad
          v^\top H v = v^\top \nabla (\nabla \ell^\top v).

A memorized example is sharp by itself and flat in the average over a population, since few other examples bend the
loss along its directions: arXiv:2510.24256, section 7.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_curvature._checks import did_you_mean
from lightning_curvature.analysis.style import KINDS

Direction = Mapping[str, Tensor]
"""A direction of the weights of some layers, by name; each has the shape of its layer's ``weight``."""


class Products:
    """Products of the curvature of the mean loss over some data with directions of the weights.

    The graph of one forward pass is kept as long as this object is; attention runs by its plain formula, since fused
    kernels cannot be differentiated twice.

    Args:
        module: The network, in the mode (train or eval) that the caller has set; its weights and ``.grad`` stay.
        layers: Names of layers; their ``weight`` must need gradients.
        logits: Runs the network on the data, and returns the logits of the loss positions, ``[n, classes]``.
        targets: Their labels, ``[n]``; needed for :meth:`hessian` alone.

    Raises:
        ValueError: If there is no such layer, or the logits are no matrix.
        RuntimeError: If a layer's weight needs no gradient, or the logits do not depend on it.
    """

    def __init__(
        self, module: nn.Module, layers: Sequence[str], logits: Callable[[], Tensor], targets: Tensor | None = None
    ) -> None:
        modules = dict(module.named_modules())
        for name in layers:
            if name not in modules:
                raise ValueError(f"There is no layer {name!r}.{did_you_mean(name, modules)}")
        self.weights: dict[str, Tensor] = {name: modules[name].weight for name in layers}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._logits = logits()
            if self._logits.dim() != 2:
                raise ValueError(f"Expected logits [n, classes], found {list(self._logits.shape)}.")
            self._probe = torch.zeros_like(self._logits, requires_grad=True)
            self._pulled = torch.autograd.grad(self._logits, [*self.weights.values()], self._probe, create_graph=True)
            self._p = self._logits.detach().softmax(-1)
            self._slope = None
            if targets is not None:
                loss = torch.nn.functional.cross_entropy(self._logits, targets)
                self._slope = torch.autograd.grad(loss, [*self.weights.values()], create_graph=True)

    def __len__(self) -> int:
        return len(self._logits)

    def pushed(self, direction: Direction) -> Tensor:
        """Return ``J v``: the change of the logits along a direction, ``[n, classes]``."""
        (change,) = torch.autograd.grad(self._pulled, self._probe, self._ordered(direction), retain_graph=True)
        return change

    def quadratics(self, direction: Direction) -> Tensor:
        """Return ``v^T GGN v`` of each loss position, ``[n]``."""
        change = self.pushed(direction)
        return (self._p * change.square()).sum(1) - (self._p * change).sum(1).square()

    def ggn(self, direction: Direction) -> dict[str, Tensor]:
        """Return the product of the GGN of the mean loss with a direction."""
        change = self.pushed(direction)
        bent = self._p * (change - (self._p * change).sum(1, keepdim=True)) / len(self)
        return self._named(torch.autograd.grad(self._logits, [*self.weights.values()], bent, retain_graph=True))

    def hessian(self, direction: Direction) -> dict[str, Tensor]:
        """Return the product of the Hessian of the mean loss with a direction.

        Raises:
            RuntimeError: If no targets were given.
        """
        if self._slope is None:
            raise RuntimeError("The Hessian needs the labels: pass targets=.")
        return self._named(
            torch.autograd.grad(
                self._slope,
                [*self.weights.values()],
                self._ordered(direction),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        )

    def trace(self, draws: int = 8, seed: int = 0) -> float:
        """Return an unbiased estimate of the trace of the GGN of the mean loss, from random signs at each class.

        Args:
            draws: Draws of the signs to average over.
            seed: Seed of the signs.
        """
        generator = torch.Generator(self._logits.device).manual_seed(seed)
        total, root = 0.0, self._p.sqrt()
        for _ in range(draws):
            signs = torch.empty_like(root).bernoulli_(0.5, generator=generator) * 2 - 1
            # The signs of two positions are independent, so that their products have mean zero.
            drawn = root * signs - self._p * (root * signs).sum(1, keepdim=True)
            slopes = torch.autograd.grad(self._logits, [*self.weights.values()], drawn, retain_graph=True)
            total += sum(float(slope.double().square().sum()) for slope in slopes)
        return total / draws / len(self)

    def _ordered(self, direction: Direction) -> list[Tensor]:
        return [direction[name].to(weight) for name, weight in self.weights.items()]

    def _named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.weights, (tensor.detach() for tensor in tensors), strict=True))


def inner(first: Direction, second: Direction) -> float:
    """Return the inner product of two directions."""
    return sum(float((first[name].double() * second[name].double()).sum()) for name in first)


def top_curvature(
    products: Products, steps: int = 100, tolerance: float = 1e-3, seed: int = 0
) -> tuple[float, dict[str, Tensor]]:
    """Return the largest eigenvalue of the GGN of the mean loss, and its eigenvector of unit norm, by power iteration.

    Args:
        products: The GGN.
        steps: Products at most.
        tolerance: Relative change of the eigenvalue at which to stop.
        seed: Seed of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    vector = {
        name: torch.randn(w.shape, generator=generator, dtype=torch.float32, device="cpu").to(w)
        for name, w in products.weights.items()
    }
    value = 0.0
    for _ in range(steps):
        norm = max(inner(vector, vector) ** 0.5, torch.finfo(torch.float64).tiny)
        vector = {name: tensor / norm for name, tensor in vector.items()}
        image = products.ggn(vector)
        before, value = value, inner(vector, image)
        if abs(value - before) <= tolerance * value:
            break
        vector = image
    norm = max(inner(vector, vector) ** 0.5, torch.finfo(torch.float64).tiny)
    return value, {name: tensor / norm for name, tensor in vector.items()}


@dataclass(frozen=True)
class Gathering:
    """Curvature along the sharpest direction of single examples, in averages over growing sets that hold them.

    Args:
        sizes: Number of examples in each set, 1 first: the example itself.
        memorized: For each memorized example, the curvature along its sharpest direction, averaged over each set.
        clean: The same for each clean example.
        traces: Trace of the GGN of each example alone: of memorized examples, and of clean examples.
    """

    sizes: tuple[int, ...]
    memorized: tuple[tuple[float, ...], ...]
    clean: tuple[tuple[float, ...], ...]
    traces: tuple[tuple[float, ...], tuple[float, ...]]

    def medians(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the median curvature at each size, of memorized and of clean examples."""
        memorized, clean = (
            tuple(torch.tensor(kind, dtype=torch.float64).quantile(0.5, 0).tolist())
            for kind in (self.memorized, self.clean)
        )
        return memorized, clean

    @property
    def crossing(self) -> int | None:
        """The first size at which the median of memorized examples is flatter than that of clean examples.

        None if there is no such size, or if memorized examples are not sharper alone.
        """
        memorized, clean = self.medians()
        if memorized[0] <= clean[0]:
            return None
        curves = zip(self.sizes, memorized, clean, strict=True)
        return next((size for size, memorized_value, clean_value in curves if memorized_value < clean_value), None)

    def plot(self) -> Any:
        """Return a figure of both kinds over the size of the set."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 4.4), layout="constrained")
        axes = figure.subplots()
        for curves, median, color, label in zip(
            (self.memorized, self.clean), self.medians(), KINDS, ("memorized", "clean"), strict=True
        ):
            for curve in curves:
                axes.plot(self.sizes, curve, color=color, alpha=0.15, linewidth=0.8)
            axes.plot(self.sizes, median, "o-", color=color, label=f"{label}, median of {len(curves)}")
        if self.crossing is not None:
            axes.axvline(
                self.crossing, color="black", linestyle="--", linewidth=1.0, label=f"crossing: {self.crossing}"
            )
        axes.set(xscale="log", yscale="log", xlabel="examples averaged, the example itself among them")
        axes.set(ylabel="curvature along its sharpest direction", title="Sharp alone, flat in a population?")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        return figure


def gather(
    make: Callable[[int], Products],
    memorized: Sequence[int],
    clean: Sequence[int],
    population: Sequence[int],
    sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
) -> Gathering:
    """Find the sharpest direction of single examples, and how sharp it is in averages over more and more examples.

    Args:
        make: Returns the products of one example, given its index.
        memorized: Indices of memorized examples.
        clean: Indices of clean examples.
        population: Indices of examples to average with, in this order; an example is not averaged with itself.
        sizes: Sizes of the sets, rising, of which the first is 1.

    Raises:
        ValueError: If the population is too small.
    """
    if sizes[0] != 1 or list(sizes) != sorted(set(sizes)) or len(population) < sizes[-1]:
        raise ValueError(
            f"Sizes must rise from 1, and the population must have as many examples as the last; found {list(sizes)} "
            f"and {len(population)}."
        )
    examples = [*memorized, *clean]
    directions, traces = [], []
    values: list[list[float]] = []  # along the sharpest direction of each example: of itself, then of the population
    for index in examples:
        products = make(index)
        value, direction = top_curvature(products)
        directions.append(direction)
        traces.append(products.trace())
        values.append([value])
    for index in population:
        products = make(index)
        for example, direction, averaged in zip(examples, directions, values, strict=True):
            if index != example and len(averaged) < sizes[-1]:
                averaged.append(float(products.quadratics(direction).mean()))
    sums = [torch.tensor(averaged, dtype=torch.float64).cumsum(0) for averaged in values]
    curves = [tuple(float(total[size - 1]) / size for size in sizes) for total in sums]
    count = len(memorized)
    return Gathering(
        tuple(sizes), tuple(curves[:count]), tuple(curves[count:]), (tuple(traces[:count]), tuple(traces[count:]))
    )
