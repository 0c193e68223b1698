"""An edit that is killed, or finds the disk full, leaves the old file or the new one."""

import os
import shutil
import signal
import sys

import pytest

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.storage import atomic
from tests.support import processes
from tests.support.saved import EDITOR, FORMATS, factors, hashes, saved_hash, source, target


def edit_until_killed(source, factors, target, when):
    """Edit a file, and die at the when-th operation on files."""
    loaded, count = KroneckerFactors.load(factors), 0

    def audit(event, args):
        nonlocal count
        if event in ("open", "os.rename", "shutil.copyfile", "os.mkdir", "os.remove", "os.rmdir"):
            count += 1
            if count == when:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    CurvatureEditor(0.8).edit_checkpoint(source, loaded, target, overwrite=True)


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "ckpt"])
def test_a_killed_process_leaves_the_old_or_the_new(saved_model, tmp_path, kind):
    """At many points; and the next run succeeds."""
    out = target(tmp_path, kind)
    if kind == "sharded":
        shutil.copytree(saved_model / "sharded", out)
    else:
        shutil.copy(source(saved_model, kind), out)
    # The archive of a .ckpt holds the random name of its temporary file.
    state = saved_hash if kind == "ckpt" else hashes
    old = state(out)
    done = target(tmp_path / "done", kind)
    EDITOR.edit_checkpoint(source(saved_model, kind), factors(saved_model), done)
    new, outcomes = state(done), []
    for when in (3, 8, 14, 20, 28, 36, 60):
        given = (source(saved_model, kind), saved_model / "factors.safetensors", out, when)
        code = processes.exit_code(edit_until_killed, *given)
        assert state(out) in (old, new)
        outcomes.append(code)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    EDITOR.edit_checkpoint(source(saved_model, kind), factors(saved_model), out, overwrite=True)
    assert state(out) == new
    assert outcomes.count(-signal.SIGKILL) >= 2


def test_a_full_disk_leaves_nothing(saved_model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "sync", full)
    monkeypatch.setattr("lightning_curvature.checkpoints.huggingface.sync", full)
    for kind in FORMATS:
        with pytest.raises(OSError, match="No space left"):
            EDITOR.edit_checkpoint(source(saved_model, kind), factors(saved_model), target(tmp_path, kind))
    assert not list(tmp_path.iterdir())
