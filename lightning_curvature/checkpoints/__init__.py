"""Saved weights: one module for each format, names of tensors, deltas, and what an edited file says about itself."""
