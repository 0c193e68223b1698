"""Edited siblings of checkpoints: when they are written, what they hold, and what they never replace."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.trainer.edited_copy import LaterCopy
from tests.support import models
from tests.support.rows import Plain, fit, loader, saved


@pytest.mark.parametrize("name", ["edited", "v2", "7"])
def test_a_preempted_job_goes_on(name, tmp_path):
    """Lightning takes the digits of all files with "ckpt_" in their names for the number of its checkpoint."""

    def trainer(epochs):
        callback = KFACEditCallback(layers=["net.0"], name=name, every=1, window=10**6)
        return callback, models.trainer(tmp_path, callback, enable_checkpointing=False, max_epochs=epochs)

    _, first = trainer(2)
    first.fit(Plain(), loader())
    first.save_checkpoint(first._checkpoint_connector.hpc_save_path(str(tmp_path)))
    files = [f"hpc-ckpt-1-{name}-factors.safetensors", f"hpc-ckpt-1-{name}.ckpt", "hpc_ckpt_1.ckpt"]
    assert saved(tmp_path) == sorted(files)
    callback, second = trainer(4)
    second.fit(Plain(), loader(), ckpt_path="hpc", weights_only=False)
    assert second.global_step == 32
    assert callback.factors["net.0"].num_inputs == 512  # those of both runs


def test_edits_are_made_once_of_the_checkpoints_that_stay(tmp_path, monkeypatch):
    decomposed = []
    solve = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: decomposed.append(len(matrix)) or solve(matrix))
    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=2, save_top_k=1, monitor=None, filename="{step}")
    fit(tmp_path, Plain(), KFACEditCallback(), saver, max_epochs=4)
    assert len(decomposed) == 2  # A and G, once for sixteen checkpoints of which one replaces the other
    assert saved(tmp_path) == ["step=32-edited-factors.safetensors", "step=32-edited.ckpt", "step=32.ckpt"]


def test_factors_of_checkpoints_that_wait_are_not_all_held(tmp_path, monkeypatch):
    """Each checkpoint gets the edit of its own factors all the same, which are read from the file beside it."""
    released, let_go = set(), LaterCopy.let_go
    monkeypatch.setattr(LaterCopy, "let_go", lambda self, file: released.add(file.name) or let_go(self, file))
    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(tmp_path, Plain(), KFACEditCallback(window=64, every=1, energy=0.7), saver, max_epochs=2)
    assert released == {f"step={step}-edited-factors.safetensors" for step in (4, 8, 12)}  # of all but the last
    for step in (4, 8, 12, 16):
        original, copied = (
            torch.load(tmp_path / "c" / f"step={step}{mark}.ckpt", weights_only=True) for mark in ("", "-edited")
        )
        factors = KroneckerFactors.load(tmp_path / "c" / f"step={step}-edited-factors.safetensors")
        expected = CurvatureEditor(0.7).edit_state_dict(original["state_dict"], factors)[0]
        assert all(torch.equal(value, copied["state_dict"][name]) for name, value in expected.items())
        assert copied["lightning_curvature"]["factors"] == factors.digest()


def test_what_edits_take_is_told_where_it_is_more_than_a_tenth(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lightning_curvature.trainer.durations.edit_seconds", lambda *shape: 40.0)
    with caplog.at_level("INFO"):
        fit(tmp_path, Plain(), KFACEditCallback(), ModelCheckpoint(tmp_path / "c", filename="x"))
    assert "edits 1 checkpoint now, at about 40 s each by the size of the layers; training took" in caplog.text


def test_every_table_names_its_file(tmp_path, caplog):
    with caplog.at_level("INFO"):
        saver = ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=-1)
        fit(tmp_path, Plain(), KFACEditCallback(), saver, max_epochs=2)
    table = caplog.text.index("Edited layers")
    assert "step=16-edited.ckpt:" in caplog.text[:table][-40:]
    assert "Edited likewise" in caplog.text[table:]
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(tmp_path, Plain(), KFACEditCallback(), enable_checkpointing=False)
    assert "No checkpoint was edited. An edit of the weights at step 16 would do:" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        models.trainer(tmp_path, KFACEditCallback()).validate(Plain(), loader(), verbose=False)
    assert "Trainer.validate writes no checkpoint. An edit of these weights would do:" in caplog.text


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_edited_copy_is_not_the_latest_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", filename="last")
    fit(tmp_path, Plain(), KFACEditCallback(), saver)
    files = sorted((tmp_path / "c").glob("last*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert files[-1].name == "last.ckpt"
    trainer = models.trainer(tmp_path / "again", KFACEditCallback(), max_epochs=3, enable_checkpointing=False)
    with (
        pytest.warns(UserWarning, match="last-edited.ckpt. This checkpoint is an edited copy"),
        pytest.warns(UserWarning, match="starts anew: its factors are kept in a file beside it"),
    ):
        trainer.fit(Plain(), loader(), ckpt_path=tmp_path / "c" / "last-edited.ckpt", weights_only=False)


def test_a_checkpoint_that_somebody_changed_meanwhile_has_no_edited_copy(tmp_path):
    class Touching(pl.Callback):
        def on_train_end(self, trainer, module):
            (tmp_path / "c" / "x.ckpt").write_bytes(b"something else")

    saver = ModelCheckpoint(tmp_path / "c", filename="x")
    with pytest.warns(UserWarning, match="x.ckpt has changed since it was saved, or is gone: it has no edited copy"):
        fit(tmp_path, Plain(), KFACEditCallback(), saver, Touching())
    assert saved(tmp_path) == ["x-edited-factors.safetensors", "x.ckpt"]


def test_a_name_that_is_a_checkpoint_of_its_own(tmp_path):
    class Both(pl.Callback):
        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "x-v1.ckpt")
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    with pytest.warns(UserWarning, match=r"x-v1.ckpt is a checkpoint of its own; give the callback another name="):
        fit(tmp_path, Plain(), KFACEditCallback(name="v1"), Both(), enable_checkpointing=False)
    assert "lightning_curvature" not in torch.load(tmp_path / "x-v1.ckpt", weights_only=True)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_file_of_somebody_else_is_neither_replaced_nor_removed(tmp_path):
    mine = tmp_path / "c" / "x-edited.ckpt"
    mine.parent.mkdir()
    torch.save({"state_dict": {"mine": torch.ones(1)}}, mine)
    saver = ModelCheckpoint(tmp_path / "c", filename="x", save_top_k=1, monitor="val_loss")
    with pytest.warns(UserWarning, match=r"x-edited.ckpt is a checkpoint of its own; give the callback another name="):
        fit(tmp_path, Plain(), KFACEditCallback(), saver, validation=loader(32), max_epochs=3)
    assert torch.load(mine, weights_only=True)["state_dict"]["mine"] == 1


def test_a_sibling_that_cannot_be_removed_costs_a_warning(tmp_path, monkeypatch):
    def stuck(path):
        raise PermissionError(f"{path} is read-only")

    monkeypatch.setattr("lightning_curvature.trainer.siblings.delete", stuck)
    saver = ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=1, monitor="step", mode="max")
    with pytest.warns(UserWarning, match="PermissionError"):
        trainer = fit(tmp_path, Plain(), KFACEditCallback(), saver, max_epochs=2)
    assert trainer.state.finished
    assert {"step=16.ckpt", "step=16-edited.ckpt"} <= set(saved(tmp_path))
