"""Collection in one pass over a frozen model."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_curvature._checks import listing
from lightning_curvature.collector import Collector
from lightning_curvature.factors import KroneckerFactors

Batch = TypeVar("Batch")


def collect(
    module: nn.Module, batches: Iterable[Batch], step: Callable[[Batch], Tensor], **options: Any
) -> KroneckerFactors:
    """Collect factors of a frozen model in one pass over data, the setting of arXiv:2510.24256.

    Args:
        module: The network. Its mode (train or eval) is yours to set; weights, ``.grad`` and random state stay.
        batches: Data.
        step: Computes the loss of a batch, as a training step would.
        **options: Arguments of :class:`lightning_curvature.collector.Collector`.

    Returns:
        The factors, by layer name.

    Raises:
        RuntimeError: If no batch could be used.
    """
    return run_collector(Collector(module, **options), batches, step)


def run_collector(collector: Collector, batches: Iterable[Batch], step: Callable[[Batch], Tensor]) -> KroneckerFactors:
    """Run a collector over data; arguments and errors as :func:`collect`. A collective with several processes."""
    for batch in batches:
        collector.open(batch)
        try:
            with torch.enable_grad():
                collector.backward(step(batch))
            collector.close()
        finally:
            collector.abort()
    check_collected(collector)
    return collector.finish()


def check_collected(collector: Collector) -> None:
    """Raise ``RuntimeError`` if a pass over data collected nothing, or nothing of some chosen layers. A collective."""
    collector.accumulator.join()  # where sums are spread, others may have more batches
    collected = any(collector.ranks.gather(bool(collector.accumulator.num_positions)))
    if not collected and (collector.chosen is None or collector.accumulator.num_skipped):
        raise RuntimeError("No batch was collected: the data were empty, or every batch held NaN or infinite values.")
    check_silent(collector.silent)


def check_silent(silent: Sequence[str]) -> None:
    """Raise ``RuntimeError`` if there are chosen layers that never ran."""
    if silent:
        raise RuntimeError(
            f"Chosen layers {listing(silent)} never ran, so they have no factors and were not edited. Leave them out "
            "of layers=, or collect over data that reach them."
        )
