"""Saved weights: one module for each format, names of tensors, deltas, and what an edited file says about itself."""

from lightning_curvature.checkpoints.base import Checkpoint
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.checkpoints.opening import open_checkpoint

__all__ = ["Checkpoint", "apply_delta", "open_checkpoint"]
