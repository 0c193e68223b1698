"""A run of each demo, with a handful of epochs."""

import subprocess
import sys

import pytest

from tests.demos.settings import SMALL


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits")
    command = [sys.executable, "-m", "lightning_curvature", "demo", "digits", "--out", str(out), "--epochs", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out, done


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("text")
    sizes = [argument for name, value in SMALL.items() for argument in (f"--settings.{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "lightning_curvature",
        "demo",
        "text",
        "--out",
        str(out),
        "--compare",
        *sizes,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return out, done
