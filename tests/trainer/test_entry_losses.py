"""The callback on models of regression and of several labels."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from lightning_curvature import KFACEditCallback
from lightning_curvature.trainer.samples import _LossReader
from tests.support import models

OUTPUTS = 3


class Fitted(models.Classifier):
    """Learns numbers, or labels, that depend on the class of an image."""

    def __init__(self, kind):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.out = nn.Linear(32, OUTPUTS)
        self.kind = kind
        codes = torch.tensor([[0.0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 1, 1]])
        self.register_buffer("codes", codes if kind != "squared" else 10 * codes - 3)

    def compared(self, batch):
        images, labels, *_ = batch
        z, y = self.out(self.net(images)), self.codes[labels]
        if self.kind == "squared":
            return F.mse_loss(z, y)
        return sigmoid_focal_loss(z, y, reduction="mean") if self.kind == "focal" else self.binary(z, y)

    def binary(self, z, y):
        return F.binary_cross_entropy_with_logits(z, y)

    def training_step(self, batch, batch_idx):
        return self.compared(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.compared(batch))


@pytest.mark.parametrize("kind", ["binary", "focal", "squared"])
def test_the_callback_measures_what_its_edit_costs(kind, tmp_path):
    pl.seed_everything(0)
    module, callback = Fitted(kind), KFACEditCallback()
    trainer = models.trainer(tmp_path, callback, max_epochs=6)
    trainer.fit(module, models.loader(models.images(256)), models.loader(models.images(256, 1)))
    assert list(callback.factors) == ["net.3"]
    purchase = callback.match
    assert purchase.budget > 0
    (before, after) = (purchase.before["validation loss"], purchase.after["validation loss"])
    rise = 0.04 * before if kind == "squared" else min(0.05, 0.1 * before)
    assert after <= min(costs["validation loss"] for costs in purchase.points.values()) + rise
    assert ("validation error" in purchase.after) == (kind != "squared")
    path = trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt")
    assert set(torch.load(path)["lightning_curvature"]["layers"]) == {"net.3"}


def test_what_a_step_says_of_these_losses():
    """Entries of weight zero do not count, and a softmax loss beside is the one that does."""
    z = torch.tensor([[2.0, -1, 3], [-1, 1, 1]])
    y = torch.tensor([[1.0, 1, 0], [0, 1, 1]])
    weight = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    with _LossReader() as reader:
        F.binary_cross_entropy_with_logits(z, y, weight=weight)
    nll = float(F.binary_cross_entropy_with_logits(z[0, :2], y[0, :2], reduction="sum"))
    assert reader.reading[1:4] == (0.5, 1, 0)
    assert reader.reading.nll == pytest.approx(nll)
    with _LossReader() as reader:
        F.mse_loss(z, y)
    assert reader.reading[1:4] == (0.0, 2, 2)
    assert reader.reading.loss == pytest.approx(float((z - y).square().sum()) / 4)
    assert not reader.reading._replace(examples=2).of_classes
    with _LossReader() as reader:
        F.mse_loss(z, y)
        F.cross_entropy(z, y.argmax(1))
    assert reader.reading[2:4] == (2, 0)
    with _LossReader() as reader:
        F.mse_loss(z.requires_grad_(), y.requires_grad_())
    assert not reader.reading.positions
