"""The command line: ``lightning-curvature``, also ``python -m lightning_curvature``."""

import logging
import sys
from pathlib import Path

from jsonargparse import auto_cli


def digits(out: Path, seed: int = 0, epochs: int = 140) -> None:
    """Train a small ViT on digits with 10 % wrong labels, edit it, and show what it forgot.

    Args:
        out: Folder for checkpoints, factors, report and pictures.
        seed: Seed of the split, the noise and the training.
        epochs: Passes over the training images.
    """
    try:
        from lightning_curvature.demos.digits import run_digits, summary
    except ModuleNotFoundError as error:
        sys.exit(f"The demo needs {error.name}: pip install 'lightning_curvature[demo]'")
    print(f"\n{summary(run_digits(out, seed, epochs))}\nWritten to {out}")


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    auto_cli({"demo": {"digits": digits}}, args=args, as_positional=False)
