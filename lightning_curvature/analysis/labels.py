"""Labelled examples, such as images, in the order of how memorized they look to a classifier."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_curvature._checks import check_option
from lightning_curvature.analysis.detection import flat_shares
from lightning_curvature.analysis.inputs import POSITIONS, layer_activations
from lightning_curvature.factors.layer import LayerFactors
from lightning_curvature.metrics.functional.margins import logit_margins


def label_scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return what a classifier says of labels, each ``[n]``, higher where they look memorized: least sure.

    Args:
        logits: Logits ``[n, classes]``.
        labels: Labels, int64 ``[n]``.

    Returns:
        ``loss``, in nats, and ``negative margin``: the largest other logit minus the label's.
    """
    loss = logits.logsumexp(1) - logits.gather(1, labels[:, None]).squeeze(1)
    return {"loss": loss, "negative margin": 0.0 - logit_margins(logits, labels)}  # of a draw 0.0, not -0.0


def rank_labelled(
    module: nn.Module,
    loader: Any,
    layer: str,
    factors: LayerFactors,
    positions: str = "all",
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Return the examples of a dataset, the one that looks most memorized first: one forward pass, no labels needed.

    Args:
        module: A classifier: of a batch of inputs it returns logits ``[n, classes]``, or an object with ``logits``.
        loader: DataLoader of the dataset, which is read in its own order, whatever the loader's; examples are
            ``(inputs, label)``, or tuples that begin so.
        layer: The layer whose inputs count.
        factors: Its factors.
        positions: ``"all"``, or ``"first"`` for those of a class token.
        batch_size: Examples per forward pass.

    Returns:
        ``rank``, ``index`` (the example's number in the dataset), ``score``
        (:func:`lightning_curvature.analysis.flat_shares`), those of :func:`label_scores`, ``label``, and ``predicted``.

    Raises:
        ValueError: If the data, or what the module returns, are no such thing.
    """
    check_option(positions, POSITIONS, "positions")
    batches: dict[str, list[Tensor]] = {}
    for inputs, labels in _labelled(loader, batch_size):
        rows, logits = _read(module, inputs, layer, POSITIONS[positions])
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise ValueError(
                f"Labels {int(labels.min())} to {int(labels.max())} are not among the {logits.shape[1]} classes of "
                f"{type(module).__name__}."
            )
        scores = {"score": flat_shares(factors, rows), **label_scores(logits, labels)}
        for name, values in (scores | {"label": labels, "predicted": logits.argmax(1)}).items():
            batches.setdefault(name, []).append(values)
    columns = {name: torch.cat(values) for name, values in batches.items()}
    order = columns["score"].argsort(descending=True, stable=True)
    ranked = {"rank": list(range(1, len(order) + 1)), "index": order.tolist()}
    ranked |= {name: values[order].tolist() for name, values in columns.items()}
    return [dict(zip(ranked, row, strict=True)) for row in zip(*ranked.values(), strict=True)]


def _read(module: nn.Module, inputs: Tensor, layer: str, positions: slice | None) -> tuple[Tensor, Tensor]:
    """Return what a layer reads of a batch, and the logits."""
    device, outputs = next(module.parameters()).device, list[Any]()

    def run(batch: Tensor) -> None:
        outputs.append(module(batch.to(device)))

    rows = layer_activations(module, [inputs], run, [layer], positions)[layer]
    logits = getattr(outputs[0], "logits", outputs[0])
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(module).__name__} returned {shape} for inputs {list(inputs.shape)}, expected logits "
            f"[{len(inputs)}, classes]."
        )
    return rows, logits.float().cpu()


def _labelled(loader: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and labels of a loader's dataset in its own order."""
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and len(dataset)):
        raise ValueError(
            f"A DataLoader of a dataset with numbered examples is needed, found {type(loader).__name__} of "
            f"{type(dataset).__name__}, which has none."
        )
    collate = default_collate if loader.batch_sampler is None else loader.collate_fn
    for batch in DataLoader(dataset, batch_size, collate_fn=collate):
        if not (isinstance(batch, (list, tuple)) and len(batch) > 1 and all(isinstance(p, Tensor) for p in batch[:2])):
            raise ValueError(
                f"Examples must be (inputs, label), found batches of type {type(batch).__name__}. Text for a language "
                "model is ranked by its folder (detect --model)."
            )
        inputs, labels = batch[:2]
        if labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(f"Labels must be class indices [n], found {labels.dtype} {list(labels.shape)}.")
        yield inputs, labels
