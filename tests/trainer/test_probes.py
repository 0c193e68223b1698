"""Probes of a module: what they must be, and that they disturb nothing."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from lightning_curvature import KFACEditCallback
from tests.support.rows import Plain, fit, loader, rows, saved


class Probed(Plain):
    answer = None
    reached = False

    def forward(self, x):
        return self.net(x)

    def probe_dataloader(self):
        return self.answer() if callable(self.answer) else self.answer

    def training_step(self, batch, batch_idx):
        self.reached = True
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: [loader()], r"Probed.probe_dataloader\(\) must return a dict of dataloaders .*; found a list"),
        (lambda: loader(), "must return a dict of dataloaders .*; found a DataLoader"),
        (lambda: None, "found a NoneType"),
        (lambda: {"val": torch.ones(4)}, "the probe 'val' is a Tensor; expected a DataLoader"),
        (lambda: {"val": iter(loader())}, "expected a DataLoader, or another iterable .* more than once"),
        (lambda: {"val": 3}, "the probe 'val' is a int"),
        (lambda: {"val": []}, "the probe 'val' holds no batch"),
        (
            lambda: {"val": DataLoader(torch.ones(8, 6))},
            r"Probe 'val': a batch must be \(inputs, labels\), .* Tensor\.",
        ),
        (lambda: {"val": [(torch.ones(2, 6),)]}, r"a batch must be \(inputs, labels\).* found tuple of 1"),
    ],
)
def test_a_wrong_probe_is_told_before_the_first_step(answer, message, tmp_path):
    module = Probed()
    module.answer = answer
    with pytest.raises((MisconfigurationException, ValueError), match=message) as error:
        fit(tmp_path, module, KFACEditCallback())
    assert not module.reached
    assert "tensor(" not in str(error.value)


def test_a_probe_of_a_module_without_forward(tmp_path):
    class Formless(Plain):
        def probe_dataloader(self):
            return {"val": loader()}

    message = r"measured by the module's forward\(inputs\), and Formless has none"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, Formless(), KFACEditCallback())


@pytest.mark.parametrize("share_generator", [True, False])
def test_looking_at_a_probe_does_not_move_the_random_state(share_generator, tmp_path):
    """Neither the global one, nor that of a generator that the loaders share."""

    def weights(*callbacks):
        pl.seed_everything(0)
        shared = torch.Generator().manual_seed(3) if share_generator else None
        module = Probed(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
        module.answer = lambda: {"val": DataLoader(rows(32), 8, shuffle=True, generator=shared)}
        data = DataLoader(rows(), 16, shuffle=True, generator=shared)
        fit(tmp_path, module, *callbacks, data=data, enable_checkpointing=False)
        return module.state_dict()

    plain, with_callback = weights(), weights(KFACEditCallback())
    assert all(torch.equal(value, with_callback[name]) for name, value in plain.items())


def test_a_probe_that_fails_costs_its_results(tmp_path):
    class Failing(Probed):
        def forward(self, x):
            if self.trainer.global_step:
                raise RuntimeError("out of memory")
            return super().forward(x)

    module, callback = Failing(), KFACEditCallback()
    module.answer = lambda: {"val": loader(32)}
    with pytest.warns(UserWarning, match="A probe could not be measured, and the run goes on without: out of memory"):
        fit(tmp_path, module, callback, ModelCheckpoint(tmp_path / "c", filename="x"))
    assert callback.probe_results == {}
    assert "x-edited.ckpt" in saved(tmp_path)
