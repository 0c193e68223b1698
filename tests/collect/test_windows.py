"""Which windows of a training are collected."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_curvature import KFACEditCallback
from tests.support import models


def taken(every, steps, window, batch=32, **options):
    """Return the training batches that are collected, and the collection."""
    seen = []

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, module, loss):
            if callback.is_recording:
                seen.append(trainer.fit_loop.total_batch_idx)

    callback = KFACEditCallback(layers=["net.3"], window=window, every=every)
    trainer = models.trainer(None, callback, Watch(), enable_checkpointing=False, **options)
    trainer.fit(models.Classifier(), models.loader(models.images(batch * steps), batch))
    return seen, callback


@pytest.mark.filterwarnings("ignore:The factors of layer")
def test_one_window_in_so_many_and_the_last(tmp_path):
    seen, callback = taken(4, 30, 64, max_epochs=1)  # a window is two steps
    assert seen == [0, 1, 8, 9, 16, 17, 24, 25, 27, 28]  # the last one a little early, so that it is complete in time
    assert callback.factors.provenance["step"] == 29
    assert callback.factors["net.3"].num_inputs == 64
    assert taken(1, 8, 64, max_epochs=1)[0] == list(range(8))
    assert taken(4, 5, 64, max_epochs=2)[0] == [0, 1, 7, 8]
    assert taken(4, 6, 10_000, max_epochs=1)[0] == list(range(6))  # until there is a window, each step counts
    limited = taken(4, 30, 64, max_epochs=-1, max_steps=10)[0]
    assert limited == [0, 1, 7, 8]


@pytest.mark.filterwarnings("ignore:The factors of layer")
def test_a_run_whose_end_is_not_known_has_no_last_window(tmp_path):
    class Endless(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.fit_loop.total_batch_idx == 12

    seen, callback = [], KFACEditCallback(layers=["net.3"], window=64, every=4)

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, module, loss):
            if callback.is_recording:
                seen.append(trainer.fit_loop.total_batch_idx)

    trainer = models.trainer(tmp_path, callback, Watch(), Endless(), max_epochs=-1, enable_checkpointing=False)
    trainer.fit(models.Classifier(), models.loader(models.images(320), 32))
    assert seen == [0, 1, 8, 9]


def test_nothing_is_intercepted_in_a_pause(tmp_path):
    hooks = []

    class Watch(pl.Callback):
        def on_before_backward(self, trainer, module, loss):
            hooks.append(sum(len(m._forward_hooks) for m in module.modules()))

    callback = KFACEditCallback(layers=["net.3"], window=64, every=4)
    trainer = models.trainer(tmp_path, Watch(), callback, max_epochs=1, enable_checkpointing=False)
    trainer.fit(models.Classifier(), models.loader(models.images(320), 32))
    assert [count > 0 for count in hooks] == [True, True, *[False] * 5, True, True, False]


def test_the_latest_complete_window_counts(tmp_path):
    callback, seen = KFACEditCallback(layers=["net.3"], window=64, every=1), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append((callback.factors["net.3"].num_inputs, callback.factors.provenance.get("step")))

    assert not callback.factors
    trainer = models.trainer(tmp_path, callback, Watch(), max_epochs=-1, max_steps=7, enable_checkpointing=False)
    trainer.fit(models.Classifier(), models.loader(models.images(192), 32))
    # The first window fills up, then the latest complete one stays until the next is full.
    assert seen == [(32, None), (64, 2), (64, 2), (64, 4), (64, 4), (64, 6), (64, 6)]


def test_the_window_does_not_depend_on_the_cut_into_batches(tmp_path):
    def fit(batch_size):
        pl.seed_everything(0)
        callback = KFACEditCallback(layers=["net.3"], window=64, every=1, fisher="empirical")
        module = models.Classifier()
        module.lr = 0.0
        trainer = models.trainer(tmp_path, callback, max_epochs=1, enable_checkpointing=False)
        trainer.fit(module, models.loader(models.images(192), batch_size))
        return callback.factors["net.3"]

    small_batches, large_batches = fit(16), fit(64)
    assert small_batches.num_inputs == large_batches.num_inputs == 64
    torch.testing.assert_close(small_batches.A, large_batches.A)
    torch.testing.assert_close(small_batches.G, large_batches.G)
