"""Runs in which the defaults of the callback could decide wrongly, or cost the user's fit."""

import copy
import pickle

import lightning.pytorch as pl
import peft
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_curvature import KFACEditCallback
from tests.layers.test_trained import stand_out
from tests.support import models
from tests.trainer.test_price import fit


class Net(models.Classifier):
    """A classifier around any network, with what tuners change."""

    def __init__(self, net, batch_size=32):
        super().__init__(lr=0.003)
        self.net, self.batch_size = net, batch_size

    def save_hyperparameters(self):
        """A network is none."""

    def val_dataloader(self):
        return models.loader(models.images(64, 1))

    def train_dataloader(self):
        return models.loader(models.images(128), self.batch_size)


def trained(*layers):
    torch.manual_seed(0)
    return stand_out(nn.Sequential(nn.Flatten(), *(layers or (nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 4)))))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
@pytest.mark.parametrize("first", [True, False])
def test_a_tuner_hides_no_start(finder, first, tmp_path, monkeypatch):
    """Tuners of Lightning restore a checkpoint of their own when they are done."""
    monkeypatch.chdir(tmp_path)
    options = {"num_training_steps": 10} if finder is LearningRateFinder else {"max_trials": 2}
    callback, tuner = KFACEditCallback(budget=1e-4), finder(**options)
    module = Net(trained())
    start = copy.deepcopy(module.state_dict())
    order = [tuner, callback] if first else [callback, tuner]
    pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        callbacks=order,
        default_root_dir=tmp_path,
    ).fit(module)
    assert callback.keeps_start
    assert callback.report.reference == "start"
    assert all(torch.equal(callback._start[name], start[name]) for name in start)


class InPlace(nn.Module):
    """An adapter that adds to what its base returns in place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.down, self.up = base.requires_grad_(False), nn.Linear(64, 2), nn.Linear(2, 32)

    def forward(self, x):
        out = self.base_layer(x)
        out += self.up(self.down(x))
        return out


@pytest.mark.filterwarnings("ignore:KFACEditCallback stops", "ignore:Chosen layers")
def test_an_adapter_of_another_kind_trains_on(tmp_path):
    module = Net(trained(InPlace(nn.Linear(64, 32)), nn.Tanh(), nn.Linear(32, 4)))
    fit(module, KFACEditCallback(layers="linear", reference=None, budget=1e-4), tmp_path)


def test_a_tied_layer_that_is_named_has_its_start(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight
            self.head = nn.Linear(64, 4)

        def forward(self, x):
            return self.head(self.second(torch.tanh(self.first(x.flatten(1)))))

    torch.manual_seed(0)
    callback = KFACEditCallback(layers=["net.second"], budget=1e-4)
    fit(Net(stand_out(Tied())), callback, tmp_path)
    assert callback.report.reference == "start"


def test_a_lazy_head_costs_the_start_alone(tmp_path):
    callback = KFACEditCallback(budget=1e-4)
    fit(Net(trained(nn.Linear(64, 32), nn.Tanh(), nn.LazyLinear(4))), callback, tmp_path)
    assert callback.problem is None
    assert callback.report.reference is None
    callback = KFACEditCallback(budget=1e-4, reference="start", layers=["net.1"])
    fit(Net(trained(nn.Linear(64, 32), nn.Tanh(), nn.LazyLinear(4))), callback, tmp_path / "2")
    assert callback.report.reference == "start"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:Chosen layers 'unused'")
def test_a_matrix_without_columns_is_none(tmp_path):
    module = Net(trained())
    module.unused = nn.Linear(20, 0)
    callback = KFACEditCallback(budget=1e-4)
    fit(module, callback, tmp_path)
    assert callback.report.reference == "start"


class Noise(nn.Module):
    def forward(self, weight):
        return weight + 0.01 * torch.randn_like(weight)


@pytest.mark.parametrize("kind", ["spectral", "noise"])
def test_a_weight_that_is_computed_is_not_computed_once_more(kind, tmp_path):
    """Reading it draws random numbers, or runs a step of a power iteration."""
    states = []
    for callbacks in ([], [KFACEditCallback(layers=["net.3"], budget=1e-4)]):
        torch.manual_seed(2)
        net = trained(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))
        if kind == "spectral":
            parametrizations.spectral_norm(net[1])
        else:
            parametrize.register_parametrization(net[1], "weight", Noise())
        pl.seed_everything(1)
        module = Net(net)
        trainer = models.trainer(tmp_path, *callbacks, enable_checkpointing=False)
        trainer.fit(module, models.loader(models.images(64)))
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_each_validation_decides_anew(tmp_path):
    """Of a plain module, of one with adapters, and of a plain one again."""
    plain, adapted = Validated(trained()), Validated(trained())
    adapted.net = peft.get_peft_model(
        adapted.net, peft.LoraConfig(r=2, target_modules=["1", "3"], init_lora_weights=False)
    )
    callback, loader = KFACEditCallback(min_positions=0), models.loader(models.images(128))
    for module, reference in ((plain, None), (adapted, "base"), (plain, None)):
        models.trainer(tmp_path, callback).validate(module, loader, verbose=False)
        assert callback.report.reference == reference
        assert callback.editor.soft == (reference == "base")


@pytest.mark.parametrize("make", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_of_the_callback_validates(make, tmp_path):
    callback = KFACEditCallback(budget=1e-4)
    fit(Net(trained()), callback, tmp_path)
    assert callback.keeps_start
    module = Validated(trained())
    models.trainer(tmp_path, make(callback)).validate(module, models.loader(models.images(64)), verbose=False)
