"""Runs that stop at any point, and go on where they were."""

import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_curvature import KFACEditCallback
from tests.support import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:The factors of layer .* rest on"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
    # With an OnExceptionCheckpoint Lightning looks for what an earlier run may have left.
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set, but there is no last checkpoint'),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]
BATCHES = 6


class InOrder:
    """A loader that begins an epoch where its trainer does, whatever was handed out before."""

    def __init__(self):
        self.batches = list(models.loader(models.images(32 * BATCHES), 32))
        self.trainer = None

    def __iter__(self):
        start = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed % BATCHES
        yield from self.batches[start:]

    def __len__(self):
        return BATCHES


class Stop(pl.Callback):
    """Ends the run at a step, in one of Lightning's hooks."""

    def __init__(self, hook, action, step=8):
        self.step, self.action, self.active = step, action, True
        setattr(self, hook, self.stop)

    def stop(self, trainer, *args):
        if self.active and trainer.fit_loop.epoch_loop.total_batch_idx == self.step:
            self.active = False
            self.action()


def fit(folder, *callbacks, ckpt_path=None, window=100, fisher="sketched", every=8):
    pl.seed_everything(0)
    callback, loader = KFACEditCallback(window=window, fisher=fisher, every=every), InOrder()
    trainer = models.trainer(folder, callback, *callbacks, max_epochs=3, enable_checkpointing=False)
    loader.trainer = trainer
    trainer.fit(models.Classifier(), loader, ckpt_path=ckpt_path, weights_only=True)
    return callback


def equal(factors, expected):
    return factors.digest() == expected.digest()


def raises():
    raise ValueError("stop")


ACTIONS = {
    "exception": (raises, ValueError),
    "SIGINT": (lambda: signal.raise_signal(signal.SIGINT), (KeyboardInterrupt, SystemExit)),
    "SIGTERM": (lambda: signal.raise_signal(signal.SIGTERM), (SIGTERMException, SystemExit)),
}
HOOKS = ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_zero_grad", "on_train_batch_end"]


@pytest.fixture
def handlers():
    """Whatever a stopped run leaves of signal handlers is put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("before", "window"), [(True, 100), (False, 10_000)])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ACTIONS)
def test_a_run_that_stops_anywhere_goes_on_as_if_it_had_not(name, hook, before, window, tmp_path):
    action, error = ACTIONS[name]
    whole = fit(tmp_path / "whole", window=window)
    stop = Stop(hook, action)
    saver = OnExceptionCheckpoint(tmp_path, "stopped")
    pl.seed_everything(0)
    stopped, loader = KFACEditCallback(window=window), InOrder()
    callbacks = [stop, stopped] if before else [stopped, stop]
    trainer = models.trainer(tmp_path, *callbacks, saver, max_epochs=3)
    loader.trainer = trainer
    module = models.Classifier()
    with pytest.raises(error):
        trainer.fit(module, loader)
    assert not any(m._forward_hooks for m in module.modules())
    assert (tmp_path / "stopped.ckpt").exists()
    assert (tmp_path / "stopped-edited-factors.safetensors").exists()

    resumed = fit(tmp_path, ckpt_path=tmp_path / "stopped.ckpt", window=window)
    assert equal(resumed.factors, whole.factors)
    assert resumed.factors.counts() == whole.factors.counts() == {"net.3": min(window // 64 * 64 + 64, 576)}


SCRIPT = """
import os, signal, sys
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from tests.runs.test_interruptions import InOrder, Stop
from tests.support import models
from lightning_curvature import KFACEditCallback
pl.seed_everything(0)
loader = InOrder()
saver = ModelCheckpoint(sys.argv[1], "{step}", every_n_train_steps=2, save_top_k=-1)
stop = Stop(sys.argv[2], lambda: os.kill(os.getpid(), signal.SIGKILL))
loader.trainer = models.trainer(sys.argv[1], KFACEditCallback(window=100), saver, stop, max_epochs=3)
loader.trainer.fit(models.Classifier(), loader)
"""


@pytest.mark.parametrize("hook", ["on_after_backward", "on_train_batch_end"])
def test_a_killed_run_goes_on_from_its_latest_checkpoint(hook, tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), hook],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert not list(tmp_path.glob("*.tmp*"))
    resumed = fit(tmp_path, ckpt_path=tmp_path / "step=8.ckpt")
    assert equal(resumed.factors, fit(tmp_path / "whole").factors)


def test_stopped_between_epochs_and_by_max_time(tmp_path):
    whole = fit(tmp_path / "whole", every=1)  # with pauses, what is collected depends on the planned end of the run
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    pl.seed_everything(0)
    loader = InOrder()
    loader.trainer = models.trainer(tmp_path, KFACEditCallback(window=100, every=1), saver, max_epochs=2)
    loader.trainer.fit(models.Classifier(), loader)
    assert equal(fit(tmp_path, ckpt_path=tmp_path / "epoch=1.ckpt", every=1).factors, whole.factors)
