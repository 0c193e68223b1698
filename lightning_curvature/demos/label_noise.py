"""What an edit does to noised labels: evaluation, energy curves, and the comparison with controls."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_curvature.baselines import BalancedSubnet
from lightning_curvature.baselines.methods import METHODS
from lightning_curvature.demos.noise import NoisyLabels
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.modules import evaluating
from lightning_curvature.metrics.functional import noisy_label_accuracy

METRICS = ("memorized", "recovered", "clean_train", "val_accuracy")
ENERGIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.87, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.999)
MEMORIZED_LIMIT = 0.2
"""The fraction of noised labels that a method may leave memorized; among such energies the most accurate is chosen."""

RATIOS = (0.02, 0.05, 0.1, 0.2)
"""Fractions of the weights that BalancedSubnet may set to zero."""

Batch = tuple[Tensor, Tensor]
Metrics = dict[str, float]
Curve = dict[str, dict[float, Metrics]]


def predict(model: nn.Module, data: TensorDataset, batch_size: int = 1024) -> Tensor:
    """Return the logits ``[n, classes]`` of a dataset whose first tensor is the images."""
    with evaluating(model):
        return torch.cat([model(images) for images in torch.split(data.tensors[0], batch_size)])


def evaluate(model: nn.Module, train: TensorDataset, val: TensorDataset) -> Metrics:
    """Return the rates of noised labels that are memorized and recovered, and the accuracy on clean labels.

    Args:
        model: Classifier of image batches.
        train: Images, noised labels, clean labels.
        val: Images, labels.

    Returns:
        Fractions in [0, 1] under the names of ``METRICS``.
    """
    _, noised, clean = train.tensors
    logits = predict(model, train)
    rates = {name: float(rate) for name, rate in noisy_label_accuracy(logits, noised, clean).items()}
    untouched = noised == clean
    rates["clean_train"] = float((logits.argmax(1) == clean)[untouched].double().mean())
    rates["val_accuracy"] = float((predict(model, val).argmax(1) == val.tensors[1]).double().mean())
    return rates


def changed_answers(train: TensorDataset, before: Tensor, after: Tensor) -> dict[str, dict[str, int]]:
    """Return by true class how answers on training images have changed.

    Args:
        train: Images, noised labels, clean labels.
        before: Predictions before the edit, ``[n]``.
        after: Predictions after the edit, ``[n]``.

    Returns:
        By class: images with a ``wrong`` label, of them ``recited`` before and ``still`` after, and ``recovered``:
        right after and not before; images with a ``right`` label, and of them ``lost``: right before and not after.
    """
    _, noised, clean = train.tensors
    rows = {}
    for label in sorted(set(clean.tolist())):
        wrong, right = ((clean == label) & is_so for is_so in (noised != clean, noised == clean))
        of_class = {
            "wrong": wrong,
            "recited": wrong & (before == noised),
            "still": wrong & (after == noised),
            "recovered": wrong & (after == clean) & (before != clean),
            "right": right,
            "lost": right & (before == clean) & (after != clean),
        }
        rows[str(label)] = {name: int(chosen.sum()) for name, chosen in of_class.items()}
    return rows


def energy_curves(model: nn.Module, factors: KroneckerFactors, data: NoisyLabels) -> dict[str, Curve]:
    """Evaluate every method at every energy, on both halves of the data.

    Returns:
        By half (``"tuning"``, ``"report"``), method and energy: the metrics.
    """
    halves = data.halves()
    curves: dict[str, Curve] = {half: {method: {} for method in METHODS} for half in halves}
    for method, editor in METHODS.items():
        for energy in ENERGIES:
            with editor(energy).applied(model, factors):
                for half, (train, val) in halves.items():
                    curves[half][method][energy] = evaluate(model, train, val)
    return curves


def forget_and_retain(data: NoisyLabels) -> tuple[list[Batch], list[Batch]]:
    """Return batches of images of the tuning half: with wrong labels, to forget, and with right labels, to retain."""
    images, noised, clean = data.halves()["tuning"][0].tensors
    wrong, right = (
        list(zip(torch.split(images[chosen], size), torch.split(noised[chosen], size), strict=True))
        for chosen, size in ((noised != clean, 16), (noised == clean, 64))
    )
    return wrong, right


def image_losses(module: nn.Module, batch: Batch) -> Tensor:
    """Return the negative log-likelihood of each image's label, ``[n]``."""
    return F.cross_entropy(module(batch[0]), batch[1], reduction="none")


def balanced_subnet(model: nn.Module, factors: KroneckerFactors, data: NoisyLabels) -> Metrics:
    """Return the metrics of BalancedSubnet, a rival that is told which labels of the tuning half are wrong.

    Its ratio is chosen like the energy of the other methods.

    Returns:
        ``ratio``, and the metrics of the report half.
    """
    halves, curves = data.halves(), {}
    for ratio in RATIOS:
        editor = BalancedSubnet(*forget_and_retain(data), image_losses, ratio=ratio, weight=0.1, epochs=10, lr=0.01)
        with editor.applied(model, factors):
            curves[ratio] = {half: evaluate(model, train, val) for half, (train, val) in halves.items()}
    ratio = choose_energy({ratio: by_half["tuning"] for ratio, by_half in curves.items()})
    return {"ratio": ratio, **curves[ratio]["report"]}


def choose_energy(curve: Mapping[float, Metrics], limit: float = MEMORIZED_LIMIT) -> float:
    """Return the energy of highest validation accuracy among the energies that leave at most ``limit`` memorized.

    If no energy does, return the energy that leaves the least memorized.

    >>> points = {0.5: (0.1, 0.7), 0.8: (0.2, 0.9), 0.9: (0.6, 0.95)}
    >>> choose_energy({energy: {"memorized": m, "val_accuracy": v} for energy, (m, v) in points.items()})
    0.8
    """
    forgetting = [energy for energy, metrics in curve.items() if metrics["memorized"] <= limit]
    if forgetting:
        return max(forgetting, key=lambda energy: (curve[energy]["val_accuracy"], energy))
    return min(curve, key=lambda energy: curve[energy]["memorized"])


def compare_methods(curves: Mapping[str, Curve]) -> dict[str, Metrics]:
    """Return the metrics of each method on the report half, at the energy that is chosen on the tuning half."""
    results = {}
    for method, curve in curves["tuning"].items():
        energy = choose_energy(curve)
        results[method] = {"energy": energy, **curves["report"][method][energy]}
    return results


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return rows of metrics as a table in percent."""
    body = [
        [name, f"{row['energy']:g}" if "energy" in row else "", *(f"{100 * row[metric]:.1f}" for metric in METRICS)]
        for name, row in rows.items()
    ]
    headers = ["", "energy", "memorized", "recovered", "clean train", "validation"]
    return tabulate(body, headers, disable_numparse=True, colalign=("left", *("right",) * 5))
