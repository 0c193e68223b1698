"""Results stay until others are there."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_curvature import KFACEditCallback
from tests.support import models
from tests.support.rows import Plain, fit, loader, saved


def test_a_second_fit_with_nothing_left_to_do_keeps_the_results(tmp_path):
    callback, module = KFACEditCallback(layers=["net.0"]), Plain()
    trainer = models.trainer(tmp_path, callback, max_steps=8, enable_checkpointing=False)
    trainer.fit(module, loader())
    before, report = callback.factors, callback.report
    trainer.fit(module, loader())
    assert callback.factors["net.0"] is before["net.0"]
    assert callback.report is report
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert saved(tmp_path) == ["x-edited-factors.safetensors", "x-edited.ckpt", "x.ckpt"]


def test_a_second_fit_that_trains_replaces_them(tmp_path):
    callback, module = KFACEditCallback(layers=["net.0"]), Plain()
    models.trainer(tmp_path / "1", callback, max_steps=8).fit(module, loader())
    first = callback.factors["net.0"]
    models.trainer(tmp_path / "2", callback, max_steps=4).fit(module, loader(64))
    assert callback.factors["net.0"].num_inputs == 64
    assert callback.factors["net.0"] is not first


@pytest.mark.parametrize("loop", ["train", "validation"])
def test_validating_other_weights_keeps_the_factors_of_a_fit(loop, tmp_path):
    callback, module = KFACEditCallback(layers=["net.0"], loop=loop), Plain()
    trainer = models.trainer(tmp_path / loop, callback, max_epochs=1)
    trainer.fit(module, loader(), loader(32))
    before = callback.factors
    checkpoint = tmp_path / loop / "other.ckpt"
    content = {"state_dict": Plain(lr=1).state_dict(), "global_step": 5, "pytorch-lightning_version": "2.6.0"}
    torch.save(content, checkpoint)
    trainer.validate(Plain(), loader(32), ckpt_path=checkpoint, verbose=False, weights_only=True)
    assert callback.factors["net.0"] is before["net.0"]
    assert callback.factors.provenance.get("step") == (8 if loop == "validation" else None)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_validation_of_a_checkpoint_states_its_step(tmp_path):
    fit(tmp_path, Plain(), ModelCheckpoint(tmp_path / "c", filename="x"), max_epochs=2)
    callback = KFACEditCallback(layers=["net.0"])
    models.trainer(tmp_path / "v", callback, enable_checkpointing=False).validate(
        Plain(), loader(32), ckpt_path=tmp_path / "c" / "x.ckpt", verbose=False, weights_only=True
    )
    assert callback.factors.provenance["step"] == 16


@pytest.mark.parametrize("how", [pickle.dumps, copy.deepcopy])
def test_a_copy_of_the_callback_has_its_settings_and_results(how, tmp_path):
    callback = KFACEditCallback(layers=["net.0"], energy=0.7)
    fit(tmp_path / "1", Plain(), callback)
    twin = pickle.loads(how(callback)) if how is pickle.dumps else how(callback)
    assert twin.factors.digest() == callback.factors.digest()
    assert str(twin.report) == str(callback.report)
    assert (twin.editor.energy, twin.state_key) == (0.7, callback.state_key)
    assert callback.factors["net.0"].num_inputs == 256  # the original is as it was
    fit(tmp_path / "2", Plain(), twin, data=loader(64), max_epochs=1)
    assert twin.factors["net.0"].num_inputs == 64
