"""What tests of several folders read."""

import os

import pytest

# Sums of one thread are the same on every machine. Set before torch is imported, and for programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

pytest.register_assert_rewrite("tests.support", "tests.reference")  # their assertions say what they compare


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """A folder with one model in every format, and its factors; no test changes it."""
    from tests.support import saved  # imports transformers, which most tests do not need

    folder = tmp_path_factory.mktemp("saved")
    saved.write_model(folder)
    return folder
