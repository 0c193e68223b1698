"""Colours of the figures of the analyses."""

MEMORIZED, CLEAN, SHARP = "#c0392b", "#7f8c8d", "#2471a3"
KINDS = (MEMORIZED, CLEAN)
"""Of memorized examples, and of others."""
