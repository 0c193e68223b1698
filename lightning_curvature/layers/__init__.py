"""Layers that can be edited: their kinds, which of them are meant, and their weights in a module."""

from lightning_curvature.layers.kinds import refusal
from lightning_curvature.layers.selection import choose_layers

__all__ = ["choose_layers", "refusal"]
