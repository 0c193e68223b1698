"""Every reader of files on ten thousand damaged ones: each gives a valid object, or an error that names the file.

Damage is random and the same in every run: bytes flipped, cut off, taken out, repeated and replaced; and values, keys,
types and shapes changed in headers and records that are whole otherwise.
"""

import random

import pytest

from lightning_curvature import KroneckerFactors
from lightning_curvature.factors.files import is_factor_file, load_state
from tests.support.damage import damaged, damaged_archive, damaged_cells, damaged_header, damaged_json, damaged_lines
from tests.support.files import (
    checkpoint_file,
    configuration,
    delta_of_a_file,
    delta_of_a_folder,
    factor_file,
    lines,
    note,
    old_archive,
    paper_file,
    safetensors_file,
    shard,
    sharded,
    sweep_file,
    text_file,
)
from tests.support.readers import (
    describe_file,
    describe_folder,
    import_factors,
    load_factors,
    open_factors,
    probe_of,
    questions_of,
    read_checkpoint,
    read_folder,
    read_names,
    read_state,
    rows_of,
    sequences_of,
    tell_factors,
    tokens_of,
    use_delta,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # torch and transformers warn of what they find odd


def refusal(read, path):
    try:
        read(path)
    except (ValueError, FileNotFoundError) as error:  # what else is raised fails the test, and leaves the file behind
        return error


def is_clean(error, path):
    """Tell whether the package itself raised an error, and names the file or the folder it belongs to."""
    named = path.name in str(error) or f"{path.parent}:" in str(error)
    return named and type(error) in (ValueError, FileNotFoundError)


def peak_memory():
    """The most memory that this process ever held, in whatever unit the system has."""
    resource = pytest.importorskip("resource")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


READERS = {
    "load": (factor_file, load_factors, 900, damaged_header),
    "open": (factor_file, open_factors, 900, damaged_header),
    "load_state": (factor_file, read_state, 900, damaged_header),
    "is_factor_file": (factor_file, tell_factors, 300, damaged_header),
    "describe factors": (factor_file, describe_file, 300, damaged_header),
    "import": (paper_file, import_factors, 700, damaged_archive),
    "safetensors": (safetensors_file, read_checkpoint, 900, damaged_header),
    "describe safetensors": (safetensors_file, describe_file, 300, damaged_header),
    "archive": (checkpoint_file, read_checkpoint, 800, damaged_archive),
    "old archive": (old_archive, read_checkpoint, 300, damaged_archive),
    "describe archive": (checkpoint_file, describe_file, 300, damaged_archive),
    "index": (sharded, read_folder, 700, damaged_json),
    "shard": (shard, read_folder, 400, damaged_header),
    "note": (note, describe_folder, 300, damaged_json),
    "config": (configuration, read_names, 100, damaged_json),
    "apply to a folder": (delta_of_a_folder, use_delta("model", "out", False), 200, damaged_header),
    "revert a folder": (delta_of_a_folder, use_delta("out", "model", True), 200, damaged_header),
    "revert a file": (delta_of_a_file, use_delta("out.safetensors", "edited.safetensors", True), 300, damaged_header),
    "describe a delta": (delta_of_a_file, describe_file, 300, damaged_header),
    "sequences": (lines("sequences"), sequences_of, 800, damaged_lines),
    "documents": (lines("documents"), tokens_of, 500, damaged_lines),
    "text": (text_file, tokens_of, 300),
    "questions": (lines("questions"), questions_of, 300, damaged_lines),
    "probe": (lines("documents"), probe_of, 300, damaged_lines),
    "sweep": (sweep_file, rows_of, 800, damaged_cells),
}
"""What writes a file, what reads it, how many damaged ones, and how their structure is damaged."""


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_refused_by_its_name(reader, tmp_path):
    write, read, count, *structured = READERS[reader]
    path, rng = write(tmp_path), random.Random(reader)
    good, there = path.read_bytes(), sorted(tmp_path.rglob("*"))
    read(path)
    refused, before = 0, peak_memory()
    for number in range(count):
        path.write_bytes(damaged(rng, good, *structured))
        error = refusal(read, path)
        assert error is None or is_clean(error, path), f"file {number}: {error!r}"
        assert sorted(tmp_path.rglob("*")) == there
        refused += error is not None
    assert peak_memory() < 1.5 * before
    assert refused > count / 5 or read is tell_factors
    path.write_bytes(good)
    read(path)


def test_a_factor_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    path = factor_file(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        for read in (KroneckerFactors.load, KroneckerFactors.open, load_state):
            with pytest.raises(ValueError, match=r"f\.safetensors: not a complete factor file"):
                read(path)
        assert not is_factor_file(path)
