"""``python -m lightning_curvature``."""

from lightning_curvature.cli import main

main()
