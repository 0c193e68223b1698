"""The data of the text demo that methods of unlearning by training may see."""

import torch
from torch import Tensor

from lightning_curvature.baselines import BalancedSubnet
from lightning_curvature.demos.language_model import LitCausalLM
from lightning_curvature.demos.recitation import RecitedText
from lightning_curvature.text.suffixes import Suffixes, suffix_batches, suffix_nll


def text_sets(model: LitCausalLM, data: RecitedText, domain: bool = True) -> tuple[list[Suffixes], list[Suffixes]]:
    """Return batches to forget and batches to retain.

    Args:
        model: The model.
        data: Its data; the tuning half of the memorized sequences is to be forgotten, clean training text retained.
        domain: Whether half of each batch to retain is text of the memorized domain that was never trained on.
    """
    forget = list(suffix_batches(model.model, data.half("tuning"), 16))
    clean, held_out = data.collected, data.held_out["domain"]["tuning"]
    if not domain:
        return forget, [Suffixes(rows, 1) for rows in torch.split(clean[:400], 16)]
    count = min(25, len(clean) // 8)
    picked = [torch.arange(8 * i, 8 * i + 8) % len(held_out) for i in range(count)]
    return forget, [Suffixes(torch.cat([clean[8 * i : 8 * i + 8], held_out[rows]]), 1) for i, rows in enumerate(picked)]


def text_losses(module: LitCausalLM, batch: Suffixes) -> Tensor:
    """Return the mean negative log-likelihood of each suffix, ``[n]``."""
    return suffix_nll(module.model, batch)


def balanced_subnet(model: LitCausalLM, data: RecitedText) -> BalancedSubnet:
    """Return the editor of BalancedSubnet with the settings of the demo."""
    return BalancedSubnet(*text_sets(model, data), text_losses, ratio=0.05, weight=0.1, epochs=10, lr=0.01)
