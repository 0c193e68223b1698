"""Colours of all figures: each is named once here, and a figure says what it stands for."""

RED, ORANGE, GREEN, BLUE, GREY, PALE = "#c0392b", "#d68910", "#1e8449", "#2471a3", "#7f8c8d", "#d5dbe1"

MEMORIZED, CLEAN, SHARP = RED, GREY, BLUE
KINDS = (MEMORIZED, CLEAN)
"""Of memorized examples, and of others."""
