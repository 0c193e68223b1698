"""Edits of language models that cost a given perplexity, and what they cost on other text."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_curvature.editing.base import Editor
from lightning_curvature.factors.kronecker import KroneckerFactors
from lightning_curvature.search.energy import Match, match_energy
from lightning_curvature.text.evaluation import perplexity

RESAMPLES = 2000
"""Samples of the bootstrap."""


def match_perplexity(
    model: nn.Module,
    factors: KroneckerFactors,
    editor: Editor,
    windows: Tensor,
    limit: float,
    module: nn.Module | None = None,
    num_leading: int = 0,
) -> Match:
    """Find the strongest edit that raises the perplexity at most to ``limit`` times what it was.

    Args:
        model: A transformers causal LM in eval mode.
        factors: Factors, by names relative to ``module``.
        editor: The editor whose energy is searched for.
        windows: Text to choose by, int64 ``[N, T]``; report results on other text.
        limit: Allowed perplexity, as a multiple of the unedited model's.
        module: The module whose layers ``factors`` name, such as a LightningModule that holds the model; by default the
            model.
        num_leading: Tokens in front of each window that are no text.

    Returns:
        The strongest edit: its energy, the multiple that it reaches, and all multiples that were measured, by energy.
    """
    measure = functools.partial(perplexity, model, windows, num_leading=num_leading)
    return match_energy(editor, module or model, factors, measure, limit)


class Ratio(NamedTuple):
    """The perplexity as a multiple of what it was, with the bounds of its 95 % interval over text of the same kind."""

    value: float
    low: float
    high: float


def perplexity_ratio(before: Tensor, after: Tensor, seed: int = 0) -> Ratio:
    """Compare a model before and after an edit on the same windows, by a paired bootstrap over windows.

    Args:
        before: Nats per token of each window before the edit, ``[N]``, as
            :func:`lightning_curvature.text.evaluation.window_nll` returns them.
        after: Nats per token of the same windows under the edited model, ``[N]``.
        seed: Seed of the bootstrap; the global random state is not touched.

    Example:
        >>> perplexity_ratio(torch.ones(9), torch.ones(9) + 0.1).value  # exp(0.1)
        1.105170...
    """
    difference = after.double() - before.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(difference), (RESAMPLES, len(difference)), generator=generator)
    means = difference[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = means.exp().tolist()
    return Ratio(float(difference.mean().exp()), low, high)
