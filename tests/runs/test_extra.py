"""The callback is an extra: a training that runs without it runs with it, and what it cannot do costs a warning."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm

from lightning_curvature import KFACEditCallback
from lightning_curvature.collect.passes import collect
from tests.support import models
from tests.support.rows import Plain, fit, loader, rows, saved

# Whatever the callback meets -----------------------------------------------------------------------------------------


HOOKS = [
    "on_train_batch_start",
    "on_before_backward",
    "on_train_batch_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_validation_start",
    "on_validation_epoch_end",
    "on_fit_end",
]

PARTS = {
    "on_train_batch_start": "lightning_curvature.collect.windows.WindowedFactors.is_due",
    "on_before_backward": "lightning_curvature.recording.step.Step.before_backward",
    "on_train_batch_end": "lightning_curvature.collect.accumulator.Accumulator.add",
    "a layer's hook": "lightning_curvature.recording.taps.Taps._record",
    "a loss": "lightning_curvature.recording.taps.read_loss",
    "a checkpoint's factors": "lightning_curvature.collect.windows.WindowedFactors.snapshot",
    "a checkpoint's edit": "lightning_curvature.trainer.edited_copy.edited_copy",
    "on_train_end": "lightning_curvature.collect.windows.WindowedFactors.synchronise",
    "a table": "lightning_curvature.editing.report.EditReport.__str__",
}


@pytest.mark.parametrize("loop", ["train", "validation"])
@pytest.mark.parametrize("part", PARTS)
def test_an_error_of_its_own_ends_no_training(part, loop, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ArithmeticError("of its own")

    def weights(*callbacks):
        module = Plain()
        saver = ModelCheckpoint(tmp_path / "c")
        trainer = fit(tmp_path, module, *callbacks, saver, validation=loader(32), max_epochs=2)
        assert trainer.global_step == 16
        return module.state_dict()

    plain = weights()
    monkeypatch.setattr(PARTS[part], fails)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with_callback = weights(KFACEditCallback(loop=loop))
    assert all(torch.equal(value, with_callback[name]) for name, value in plain.items())


def test_an_error_of_its_own_is_told_once_and_costs_the_copy(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ArithmeticError("of its own")

    callback = KFACEditCallback()
    monkeypatch.setattr("lightning_curvature.collect.accumulator.Accumulator.add", fails)
    saver = ModelCheckpoint(tmp_path / "c", filename="x")
    with pytest.warns(UserWarning, match="stops, and training goes on: of its own Checkpoints .* no edited copy"):
        fit(tmp_path, Plain(), callback, saver)
    assert callback.problem == "of its own"
    assert saved(tmp_path) == ["x.ckpt"]


def test_an_error_of_the_module_ends_it_as_without_the_callback(tmp_path):
    class Failing(Plain):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("of the module")
            return super().training_step(batch, batch_idx)

    module = Failing()
    with pytest.raises(KeyError, match="of the module"):
        fit(tmp_path, module, KFACEditCallback())
    assert not any(m._forward_hooks for m in module.modules())


class Backbone(Plain):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:4], self.net[4]
        del self.net

    def loss(self, batch):
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


def test_layers_that_are_frozen_for_some_epochs_are_collected_afterwards(tmp_path):
    callback = KFACEditCallback(layers=["backbone.*"], every=1)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=2, lambda_func=lambda epoch: 1.0)
    with pytest.warns(
        UserWarning, match="'backbone.0', 'backbone.2' need no gradient: everything up to them is frozen"
    ):
        trainer = fit(tmp_path, Backbone(), callback, thaw, max_epochs=4)
    assert trainer.global_step == 32
    assert callback.factors.counts() == {"backbone.0": 256, "backbone.2": 256}  # of the last two epochs


def test_layers_that_stay_frozen_cost_a_warning(tmp_path):
    module = Plain()
    module.net[0].requires_grad_(False)
    callback = KFACEditCallback(layers=["net.0", "net.2"])
    with (
        pytest.warns(UserWarning, match="Chosen layers 'net.0' ran without gradients"),
        pytest.warns(UserWarning, match=r"Chosen layers 'net.0' never ran \(the outputs of 'net.0' needed no gradient"),
    ):
        fit(tmp_path, module, callback)
    assert list(callback.report.layers) == ["net.2"]


def lazy():
    warnings.filterwarnings("ignore", "Lazy modules")
    return nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("loop", ["train", "validation"])
def test_lazy_layers(loop, tmp_path):
    module, callback = Plain(lazy), KFACEditCallback(loop=loop)
    trainer = fit(tmp_path, module, callback, validation=loader(32), max_epochs=2, num_sanity_val_steps=0)
    assert trainer.global_step == 16
    assert list(callback.run.windows.factors) == ["net.2"]
    assert (tmp_path / "lightning_logs").exists() or saved(tmp_path)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("wrap", [weight_norm, spectral_norm])
def test_weights_that_are_computed_before_each_forward_pass(wrap, tmp_path):
    net = lambda: nn.Sequential(wrap(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))  # noqa: E731
    callback = KFACEditCallback(layers="mlp")
    with pytest.warns(UserWarning, match=rf"'net.0' .*torch.nn.utils.{wrap.__name__}"):
        trainer = fit(tmp_path, Plain(net), callback, enable_checkpointing=False)
    assert trainer.global_step == 16
    with pytest.raises(ValueError, match=r"Layer 'net.0' \(matched by 'net.0'\) cannot be edited"):
        fit(tmp_path, Plain(net), KFACEditCallback(layers=["net.0"]))  # a mistake in an argument, before the first step


def test_a_network_that_a_preset_has_no_layers_for(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(x[:, None])[0][:, 0]

    callback = KFACEditCallback()
    with pytest.warns(UserWarning, match="training goes on: Preset 'last-mlp' matches no layer"):
        trainer = fit(tmp_path, Plain(Recurrent), callback)
    assert trainer.global_step == 16
    assert "Preset" in callback.problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "mlps"}, "Did you mean 'last-mlp' or 'mlp'"),
        ({"layers": ["net.9"]}, "matches no editable layer"),
        ({"logits": "heads"}, "logits='heads' is neither a submodule nor a method"),
    ],
)
def test_a_mistake_in_an_argument_is_an_error_before_the_first_step(options, message, tmp_path):
    class Counting(Plain):
        steps = 0

        def training_step(self, batch, batch_idx):
            self.steps += 1
            return super().training_step(batch, batch_idx)

    module = Counting()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, module, KFACEditCallback(**options))
    assert module.steps == 0


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
@pytest.mark.parametrize("loop", ["train", "validation"])
def test_whatever_the_default_dtype(precision, loop, tmp_path):
    callback = KFACEditCallback(layers=["net.0"], loop=loop)
    fit(tmp_path / "fit", Plain(), callback, validation=loader(32), precision=precision)
    expected = torch.float64 if precision == "64-true" else torch.float32
    assert callback.factors["net.0"].A.dtype == expected
    alone = KFACEditCallback(layers=["net.0"])
    models.trainer(tmp_path / "alone", alone, precision=precision).validate(Plain(), loader(32), verbose=False)
    assert alone.factors["net.0"].A.dtype == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_do_not_follow_the_ambient_dtype_or_grad_mode(dtype):
    module, (x, y) = Plain(), rows(32).tensors
    step = lambda _: module.loss((x, y))  # noqa: E731
    plain = collect(module.net, [0], step, layers=["0"])["0"]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.no_grad():
            layer = collect(module.net, [0], step, layers=["0"])["0"]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(layer.A, plain.A)
    assert torch.equal(layer.G, plain.G)
