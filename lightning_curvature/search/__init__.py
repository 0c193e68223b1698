"""Which energy: the strongest edit that a price allows, and many edits side by side."""

from lightning_curvature.search.energy import Match, match_energy
from lightning_curvature.search.sweep import pareto, sweep

__all__ = ["Match", "match_energy", "pareto", "sweep"]
