"""How long edits take, beside the training before them."""

import math
from collections.abc import Iterable

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.memory import edit_seconds, training_seconds

_TENTH = 0.1  # share of the training's time above which the time of edits is told


def check_time(factors: KroneckerFactors, num_batches: int, num_steps: int) -> None:
    """Raise ``TimeoutError`` if an edit takes over a tenth of the time that the training should have taken.

    Args:
        factors: Of the layers that it edits.
        num_batches: Batches behind them, of all processes.
        num_steps: Batches that the training took on each process.
    """
    seconds = _edit_seconds(layer.shape for layer in factors.values())
    products = sum(math.prod(layer.shape) * layer.num_seen for layer in factors.values()) / num_batches * num_steps
    if seconds > _TENTH * training_seconds(products, num_steps, torch.cuda.is_available()):
        raise TimeoutError(
            f"an edit of all linear layers takes about {seconds:.2g} s, over a tenth of the training's time, both "
            'guessed by size. layers="linear", soft=True makes it nevertheless'
        )


def tell_time(num_copies: int, weights: Iterable[torch.Tensor], trained: float) -> None:
    """Say how long edits of some weights take that are made now, if that is over a tenth of the training's time.

    Args:
        num_copies: How many copies are made.
        weights: The weights that are edited in each.
        trained: Seconds that the training took.
    """
    seconds = _edit_seconds((len(weight), math.prod(weight.shape[1:])) for weight in weights)
    if num_copies * seconds > _TENTH * trained:
        rank_zero_info(
            f"KFACEditCallback edits {num_copies} checkpoint{'s' * (num_copies > 1)} now, at about {seconds:.2g} s "
            f"each by the size of the layers; training took {trained:.0f} s. Keep fewer checkpoints, or edit fewer "
            "or smaller layers, if that is too long."
        )


def _edit_seconds(shapes: Iterable[tuple[int, int]]) -> float:
    on_gpu = torch.cuda.is_available()
    return sum(edit_seconds(*shape, on_gpu) for shape in shapes)
