"""Training leaves the same weights, buffers and gradients as without the callback."""

import copy
import pickle

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature import KFACEditCallback
from tests.support.rows import Plain, fit, saved


class Looking(Plain):
    """Batch normalisation and non-reentrant checkpointing, and a look at the gradients after each backward pass."""

    def __init__(self):
        super().__init__(lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)))
        self.gradients = []

    def loss(self, batch):
        z = torch.utils.checkpoint.checkpoint(self.net, batch[0], use_reentrant=False)
        return F.cross_entropy(z, batch[1])

    def on_after_backward(self):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters()]))


def test_buffers_and_gradients_are_those_of_a_training_without_it(tmp_path):
    plain, watched = Looking(), Looking()
    fit(tmp_path / "1", plain, accumulate_grad_batches=2)
    callback = KFACEditCallback(layers=["net.0"])
    fit(tmp_path / "2", watched, callback, accumulate_grad_batches=2)
    assert callback.factors["net.0"].num_inputs == 256
    for expected, gradient in zip(plain.gradients, watched.gradients, strict=True):
        assert torch.equal(expected, gradient)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


def test_a_copy_of_the_module_inside_a_step(tmp_path):
    class Copying(Plain):
        def training_step(self, batch, batch_idx):
            teacher = copy.deepcopy(self.net)
            assert pickle.loads(pickle.dumps(self.net))[0].weight.equal(self.net[0].weight)
            with torch.no_grad():
                teacher(batch[0])
            return self.loss(batch)

    callback = KFACEditCallback(layers=["net.0"])
    fit(tmp_path, Copying(), callback, max_epochs=1)
    assert callback.factors["net.0"].num_inputs == 128


def test_an_optimizer_that_runs_the_step_several_times_is_not_told_as_a_fault(tmp_path, recwarn):
    class Closures(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    callback = KFACEditCallback(layers=["net.0"])
    fit(tmp_path, Closures(), callback, max_epochs=1)
    assert callback.problem is None
    assert callback.factors["net.0"].num_inputs % 128 == 0
    assert not [w for w in recwarn if "KFACEdit" in str(w.message)]


def test_a_relative_folder_is_that_of_the_start(tmp_path, monkeypatch):
    class Moving(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.save_checkpoint("runs/x.ckpt")
            monkeypatch.chdir(tmp_path / "2")

    for name in "12":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "1")
    fit(tmp_path / "3", Plain(), KFACEditCallback(), Moving(), max_epochs=1, enable_checkpointing=False)
    assert "x-edited.ckpt" in saved(tmp_path / "1")
    assert saved(tmp_path / "2") == []
