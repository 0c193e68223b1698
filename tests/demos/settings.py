"""Sizes of the demo of text that take seconds."""

SMALL = {"sequences": 12, "steps": 3, "exposures": 100, "collected": 32, "hidden": 128, "layers": 2, "vocab_size": 320}

WRITTEN = {
    "original.ckpt",
    "original-edited.ckpt",
    "original-edited-factors.safetensors",
    "edited.ckpt",
    "factors.safetensors",
    "report.json",
    "logs",
    "spectrum.png",
    "energy.png",
    "analysis.json",
    "report.html",
}
"""What every demo writes."""
