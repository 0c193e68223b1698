"""Checkpoint files: atomic writes, and one module per format."""
