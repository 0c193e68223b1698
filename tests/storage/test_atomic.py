"""Folders are replaced as a whole."""

from pathlib import Path

import pytest

from lightning_curvature.storage import atomic
from lightning_curvature.storage.atomic import replacing


def test_folders_are_replaced_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_exchange", lambda source, target: False)
    new, old = tmp_path / "new", tmp_path / "target"
    for folder in (new, old):
        folder.mkdir()
        (folder / "x").write_text(folder.name)
    atomic.replace_folder(new, old)
    assert (old / "x").read_text() == "new"


@pytest.mark.parametrize("lost", [False, True])
def test_an_old_folder_is_put_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, lost):
    """Also what cannot be put back is not deleted."""
    monkeypatch.setattr(atomic, "_exchange", lambda source, target: False)
    old, rename = tmp_path / "target", Path.rename
    old.mkdir()
    (old / "x").write_text("old")

    def failing(self, to):
        if self.name == "new" or (lost and self.name == "new.old"):
            raise OSError(28, "No space left on device")
        return rename(self, to)

    def write():
        with atomic.replacing_folder(old) as new:
            new.mkdir()

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        write()
    (kept,) = tmp_path.rglob("x")
    assert kept.read_text() == "old"
    assert (kept.parent == old) == (not lost)
    assert lost or list(tmp_path.iterdir()) == [old]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def write():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
