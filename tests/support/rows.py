"""A small classifier of rows of numbers, its data, and a training of it."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support import models


class Plain(pl.LightningModule):
    """A classifier of rows of six numbers."""

    def __init__(self, net=None, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
        self.net = self.net if net is None else net()
        self.lr = lr

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.lr)


def rows(n=128, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator))


def loader(n=128, batch_size=16):
    return DataLoader(rows(n), batch_size)


def fit(folder, module, *callbacks, data=None, validation=None, **options):
    trainer = models.trainer(folder, *callbacks, **options)
    trainer.fit(module, loader() if data is None else data, validation)
    return trainer


def saved(folder):
    return sorted(path.name for path in folder.rglob("*") if path.suffix in (".ckpt", ".safetensors"))
