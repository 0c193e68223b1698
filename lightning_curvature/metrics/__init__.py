"""Metrics of memorization and of general quality: torchmetrics classes with functional twins."""

from lightning_curvature.metrics.leakage import ExtractionStrength, MinKProbability
from lightning_curvature.metrics.memorization import (
    LongestExactPrefix,
    LooseMemorization,
    NormalizedEditDistance,
    StrictMemorization,
)
from lightning_curvature.metrics.noisy_labels import NoisyLabelAccuracy
from lightning_curvature.metrics.perplexity import Perplexity
from lightning_curvature.metrics.ranking import RankingOverlap
from lightning_curvature.metrics.recall import RecallAccuracy

__all__ = [
    "ExtractionStrength",
    "LongestExactPrefix",
    "LooseMemorization",
    "MinKProbability",
    "NoisyLabelAccuracy",
    "NormalizedEditDistance",
    "Perplexity",
    "RankingOverlap",
    "RecallAccuracy",
    "StrictMemorization",
]
