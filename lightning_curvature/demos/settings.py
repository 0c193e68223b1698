"""Sizes of the text demo, in a file that needs none of the optional packages."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """Sizes of the text demo.

    Args:
        sequences: Memorized sequences, and as many unseen ones.
        steps: Batches of clean text before anything is repeated.
        exposures: Times that each sequence occurs.
        collected: Rows of clean training text for the factors, 128 tokens each.
        hidden: Model width; the MLPs are four times as wide.
        layers: Blocks.
        vocab_size: Tokens.
    """

    sequences: int = 128
    steps: int = 600
    exposures: int = 50
    collected: int = 800
    hidden: int = 256
    layers: int = 4
    vocab_size: int = 2048


TEXT = TextSettings()
"""The text demo as it is shown in the README."""
