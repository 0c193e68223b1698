"""The analyses of the digits demo: bands of the spectrum, detection, directions."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_curvature.analysis.bands import BASES, BandComparison, compare_bands
from lightning_curvature.analysis.detection import detect, layer_scores
from lightning_curvature.analysis.directions import DirectionUse, direction_use
from lightning_curvature.analysis.files import Analyses
from lightning_curvature.analysis.inputs import layer_activations
from lightning_curvature.analysis.labels import label_scores
from lightning_curvature.demos.label_noise import predict
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.layers.kinds import as_matrix

log = logging.getLogger(__name__)

CLASS_TOKEN = slice(0, 1)


def analyse_images(model: Any, factors: KroneckerFactors, data: TensorDataset) -> Analyses:
    """Analyse a classifier of images with noised labels.

    An image is memorized if the model predicts its wrong label; it is compared with the images that have a true label.

    Args:
        model: Classifier of image batches whose layers read a class token first.
        factors: Its factors.
        data: Images, noised labels, clean labels.

    Returns:
        The analyses; they are empty, with a line in the log, if nothing is memorized.
    """
    images, noised, clean = data.tensors
    logits = predict(model, data)
    chosen = {
        "memorized": ((noised != clean) & (logits.argmax(1) == noised)).nonzero().flatten(),
        "clean": (noised == clean).nonzero().flatten(),
    }
    if not len(chosen["memorized"]):
        log.info("No wrong label was memorized: there is nothing to analyse.")
        return Analyses()
    names = list(factors)
    inputs = {
        kind: layer_activations(model, torch.split(images[indices], 256), model, names, CLASS_TOKEN)
        for kind, indices in chosen.items()
    }
    scores = {
        kind: layer_scores(factors, inputs[kind]) | label_scores(logits[indices], noised[indices])
        for kind, indices in chosen.items()
    }
    last = names[-1]
    everything = torch.cat([chosen["memorized"], chosen["clean"]])
    order = everything.argsort()
    both = torch.cat([inputs["memorized"][last], inputs["clean"][last]])[order]
    wrong = (noised != clean)[everything[order]].tolist()
    uses = [direction_use(last, factors[last], both, wrong, flat) for flat in (False, True)]
    places = everything[order].tolist()
    return Analyses(
        tuple(bands_of(model, factors, inputs["memorized"], inputs["clean"])),
        {"training images with a true label": detect(scores["memorized"], scores["clean"])},
        tuple(_moved(use, places) for use in uses),
    )


def bands_of(
    model: Any, factors: KroneckerFactors, memorized: Mapping[str, Tensor], clean: Mapping[str, Tensor]
) -> list[BandComparison]:
    """Compare how strongly memorized and clean examples use the bands, in each layer, each basis and each norm.

    Args:
        model: Holds the layers.
        factors: Its factors.
        memorized: By layer, its inputs on memorized examples, ``[n, positions, d_in]``.
        clean: By layer, its inputs on other examples.
    """
    comparisons = []
    for name, layer in factors.items():
        module = model.get_submodule(name)
        weight = as_matrix(module.weight.detach(), layer.transposed)
        for basis, normalize in product(BASES, (False, True)):
            comparisons.append(compare_bands(name, weight, layer, memorized[name], clean[name], basis, normalize))
    return comparisons


def _moved(use: DirectionUse, places: Sequence[int]) -> DirectionUse:
    """Return the same use with indices of the dataset, ``places``, for indices of the inputs."""
    return dataclasses.replace(use, top=tuple(tuple(places[index] for index in top) for top in use.top))
