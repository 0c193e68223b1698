"""Sizes of the demo of text that take seconds."""

SMALL = {"sequences": 12, "steps": 3, "exposures": 100, "collected": 32, "hidden": 128, "layers": 2, "vocab_size": 320}
