"""``python -m lightning_curvature``."""

from lightning_curvature.cli.parser import main

main()
