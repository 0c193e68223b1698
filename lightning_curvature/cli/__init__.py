"""The command line ``lightning-curvature``."""

from lightning_curvature.cli.parser import main

__all__ = ["main"]
