"""Words that options of several commands take; the parser lists them in its help, and refuses other words."""

from typing import Literal

Fisher = Literal["sketched", "sampled", "exact", "empirical"]
Positions = Literal["contributing", "all", "first"]
ImagePositions = Literal["all", "first"]
AccumulateOn = Literal["auto", "model", "cpu"]
Half = Literal["tuning", "validation"]
Scope = Literal["layer", "model"]
Score = Literal["kfac", "ekfac", "coupled", "activations", "saliency"]

LIGHTNING = ("fit", "validate", "test")
"""Commands that LightningCLI runs."""
