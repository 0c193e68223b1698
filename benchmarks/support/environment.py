"""Where figures were measured, and how a script that measures starts."""

import argparse
import logging
import platform
import time
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "lightning", "transformers")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the arguments of a benchmark; its help shows the docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def quiet() -> None:
    """Silence what Lightning says of every training."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")


def environment() -> dict[str, Any]:
    """Return what results may depend on: the machine, and the releases that ran."""
    return {**machine(), **versions(PACKAGES)}


def machine() -> dict[str, Any]:
    """Return the date, the release of Python, and the hardware."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Return the installed release of each package, or None."""
    releases: dict[str, str | None] = {}
    for package in packages:
        try:
            releases[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            releases[package] = None
    return releases


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
