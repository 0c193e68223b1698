"""The command line ``lightning-curvature``: its parser, its commands, and LightningCLI with example configurations."""

from lightning_curvature.cli.parser import main

__all__ = ["main"]
