"""The callback is an extra: a training that runs without it runs with it, and what it cannot do costs a warning."""

import copy
import pickle
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, ModelCheckpoint, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.utils import spectral_norm, weight_norm
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_curvature import CurvatureEditor, KFACEditCallback, KroneckerFactors
from lightning_curvature.collect.passes import collect
from lightning_curvature.trainer.edited_copy import WeightWatch
from lightning_curvature.trainer.support import RunLength
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
    assert list(callback.factors) == ["net.2"]
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
            found = collect(module.net, [0], step, layers=["0"])["0"]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(found.A, plain.A)
    assert torch.equal(found.G, plain.G)


# Probes --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("own", [True, False])
def test_looking_at_a_probe_does_not_move_the_random_state(own, tmp_path):
    """Neither the global one, nor that of a generator that the loaders share."""

    def weights(*callbacks):
        pl.seed_everything(0)
        shared = torch.Generator().manual_seed(3) if own else None
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


# Results stay until others are there ---------------------------------------------------------------------------------


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


def test_validating_other_weights_keeps_the_factors_of_a_fit(tmp_path):
    for loop in ("train", "validation"):
        callback, module = KFACEditCallback(layers=["net.0"], loop=loop), Plain()
        trainer = models.trainer(tmp_path / loop, callback, max_epochs=1)
        trainer.fit(module, loader(), loader(32))
        before = callback.factors
        other = tmp_path / loop / "other.ckpt"
        content = {"state_dict": Plain(lr=1).state_dict(), "global_step": 5, "pytorch-lightning_version": "2.6.0"}
        torch.save(content, other)
        trainer.validate(Plain(), loader(32), ckpt_path=other, verbose=False, weights_only=True)
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


# Which weights are saved ---------------------------------------------------------------------------------------------


class Average(pl.Callback):
    """Keeps averages of the weights."""

    def on_train_start(self, trainer, module):
        self.average = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, *args):
        for name, value in module.state_dict().items():
            self.average[name].mul_(0.9).add_(value, alpha=0.1)


class IntoTheFile(Average):
    def on_save_checkpoint(self, trainer, module, checkpoint):
        checkpoint["state_dict"] = {name: value.clone() for name, value in self.average.items()}


class IntoTheModule(Average):
    """Puts them into the module for each validation, and takes them out again."""

    def on_validation_start(self, trainer, module):
        if hasattr(self, "average"):
            self.own = {name: value.detach().clone() for name, value in module.state_dict().items()}
            module.load_state_dict(self.average)

    def on_validation_end(self, trainer, module):
        if hasattr(self, "own") and not self.stays:
            module.load_state_dict(self.own)

    stays = False


class AtTheEnd(Average):
    def on_train_end(self, trainer, module):
        module.load_state_dict(self.average)


class OfTheModule(Plain):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {name: 2 * value for name, value in checkpoint["state_dict"].items()}


def test_other_weights_in_the_file_have_no_edited_copy(tmp_path):
    for callbacks, module in (([IntoTheFile()], Plain()), ([], OfTheModule())):
        folder = tmp_path / type(module).__name__
        saver = ModelCheckpoint(folder / "c", filename="x")
        with pytest.warns(
            UserWarning, match="no edited copy: it holds other weights than those that were trained"
        ) as told:
            fit(folder, module, *callbacks, KFACEditCallback(), saver, max_epochs=2)
        assert len([1 for warning in told if "no edited copy" in str(warning.message)]) == 1  # of two epochs
        assert saved(folder) == ["x-edited-factors.safetensors", "x.ckpt"]


@pytest.mark.parametrize("stays", [True, False])
def test_weights_that_are_saved_as_they_are_validated(stays, tmp_path):
    """Averages that a validation sees are what its factors describe, and the live weights are not."""
    swap, callback = IntoTheModule(), KFACEditCallback(loop="validation")
    swap.stays = stays
    saver = ModelCheckpoint(tmp_path / "c", filename="x", save_on_train_epoch_end=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, Plain(), swap, callback, saver, validation=loader(32), max_epochs=2)
    assert ("x-edited.ckpt" in saved(tmp_path)) == stays
    assert any("other weights than those that were validated" in str(warning.message) for warning in told) != stays


def test_weights_that_are_swapped_after_the_last_step(tmp_path):
    saver = ModelCheckpoint(tmp_path / "c", filename="x", save_on_train_epoch_end=True)
    callback = KFACEditCallback()
    trainer = fit(tmp_path, Plain(lr=1.0), AtTheEnd(), callback, saver, max_epochs=2)
    assert "x-edited.ckpt" in saved(tmp_path)  # of before the swap
    del trainer


class Clamping(Plain):
    """Holds its weights in bounds after each step, which changes them a little."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(1 - 1e-5)


def test_a_small_change_after_each_step_is_no_swap(tmp_path):
    fit(tmp_path, Clamping(), KFACEditCallback(), ModelCheckpoint(tmp_path / "c", filename="x"), max_epochs=2)
    assert "x-edited.ckpt" in saved(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_watch_of_weights(dtype):
    weight = torch.ones(4, dtype=dtype)
    watch = WeightWatch(lambda: {"fc": weight})
    assert not watch.swapped()
    watch.end_step()
    assert not watch.swapped()
    kept = weight.clone()
    weight.mul_(2)
    assert watch.swapped()
    weight.copy_(kept)
    watch.begin_step()
    weight.add_(0.1)  # a step of training
    assert not watch.swapped()
    watch.end_step()
    kept = weight.clone()
    weight.mul_(2)
    assert watch.swapped()
    weight.copy_(kept)  # put back
    assert not watch.swapped()
    weight.data = torch.zeros_like(weight)
    assert watch.swapped()
    weight.data = kept.clone()
    assert not watch.swapped()
    weight.data.mul_(2)  # of which autograd keeps no trace
    assert watch.swapped()
    watch.begin_step()
    assert not watch.swapped()  # training goes on from there
    watch.end_step()
    weight.mul_(2)
    assert not watch.swapped()  # as usual
    weight.mul_(4)
    assert watch.swapped()


class WithoutTrace(IntoTheModule):
    """Swaps averages in through ``.data``, of which autograd keeps no trace, and keeps them in for the checkpoint."""

    def on_validation_start(self, trainer, module):
        for name, parameter in module.named_parameters():
            parameter.data.copy_(self.average[name] if hasattr(self, "average") else parameter.data)

    def on_validation_end(self, trainer, module):
        """Do not take them out."""


def test_weights_that_are_swapped_without_a_trace(tmp_path):
    """Factors of training steps do not describe averages that lie in the module when it is saved."""
    saver = ModelCheckpoint(tmp_path / "c", filename="x", save_on_train_epoch_end=False)
    with pytest.warns(UserWarning, match="no edited copy"):
        fit(tmp_path, Plain(lr=1.0), WithoutTrace(), KFACEditCallback(), saver, validation=loader(32), max_epochs=1)
    assert "x-edited.ckpt" not in saved(tmp_path)


# What is left as it was ----------------------------------------------------------------------------------------------


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
    for one, two in zip(plain.gradients, watched.gradients, strict=True):
        assert torch.equal(one, two)
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


# The last window -----------------------------------------------------------------------------------------------------


class TwoOptimizers(Plain):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), 0.1) for i in (0, 2)]


class OwnAccumulation(TwoOptimizers):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 4)
        if (batch_idx + 1) % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Stream(IterableDataset):
    """Batches of unknown number."""

    def __iter__(self):
        return iter(rows(16 * 40))


class Growing(pl.LightningDataModule):
    """Each epoch has ten batches more than the one before."""

    def train_dataloader(self):
        return loader(16 * 10 * (self.trainer.current_epoch + 1))


CASES = {
    "steps": (Plain, {}, {"max_steps": 150, "max_epochs": -1}),
    "two optimizers": (TwoOptimizers, {}, {"max_steps": 300, "max_epochs": -1}),
    "own accumulation": (OwnAccumulation, {}, {"max_steps": 40, "max_epochs": -1}),
    "accumulation": (Plain, {}, {"max_steps": 40, "max_epochs": -1, "accumulate_grad_batches": 4}),
    "a schedule": (
        Plain,
        {"callbacks": [GradientAccumulationScheduler({0: 4, 1: 1})]},
        {"max_steps": 120, "max_epochs": -1},
    ),
    "a stream": (Plain, {"data": DataLoader(Stream(), 16)}, {"max_epochs": 4}),
    "a loader that grows": (Plain, {"data": Growing()}, {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 1}),
    "part of a loader": (Plain, {}, {"max_epochs": 3, "limit_train_batches": 55}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_last_window_is_one_of_the_end(case, tmp_path):
    kind, given, options = CASES[case]
    callback = KFACEditCallback(window=160, layers=["net.0"])  # ten batches
    seen = []

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            seen.append(trainer.global_step)

    fit(
        tmp_path,
        kind(),
        callback,
        *given.get("callbacks", []),
        Count(),
        data=given.get("data", loader(16 * 80)),
        enable_checkpointing=False,
        **options,
    )
    collected = callback.factors.provenance["step"]
    last = max(index for index, step in enumerate(seen) if step <= collected)
    assert len(seen) - 1 - last <= 6, (collected, seen[-1], len(seen))


def test_the_length_of_a_run_that_a_clock_ends():
    class Clock(Timer):
        elapsed = 0.0

        def time_elapsed(self, stage="train"):
            return self.elapsed

        def time_remaining(self, stage="train"):
            return 100.0 - self.elapsed

    clock, length = Clock(), RunLength(span=4)
    trainer = pl.Trainer(callbacks=[clock], logger=False, enable_checkpointing=False, max_epochs=-1, accelerator="cpu")
    progress = trainer.fit_loop.epoch_loop.batch_progress
    for batch in range(12):
        progress.total.processed, clock.elapsed = batch, 2.0 * batch
        last = length.last_batch(trainer)
    assert last == 11 + 39 - 1  # 78 seconds are left, two for each batch


# Siblings ------------------------------------------------------------------------------------------------------------


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


def test_factors_of_checkpoints_that_wait_are_not_all_held(tmp_path):
    """Each checkpoint gets the edit of its own factors all the same, which are read from the file beside it."""
    alive = []

    class Looking(pl.Callback):
        def on_train_end(self, trainer, module):
            waiting = trainer.strategy.save_checkpoint.__self__._waiting.values()
            alive.append([isinstance(entry.edits["edited"]._factors, KroneckerFactors) for entry in waiting])

    saver = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(tmp_path, Plain(), KFACEditCallback(window=64, every=1, energy=0.7), saver, Looking(), max_epochs=2)
    assert alive == [[False, False, False, True]]
    for step in (4, 8, 12, 16):
        original, copied = (
            torch.load(tmp_path / "c" / f"step={step}{mark}.ckpt", weights_only=True) for mark in ("", "-edited")
        )
        factors = KroneckerFactors.load(tmp_path / "c" / f"step={step}-edited-factors.safetensors")
        expected = CurvatureEditor(0.7).edit_state_dict(original["state_dict"], factors)[0]
        assert all(torch.equal(value, copied["state_dict"][name]) for name, value in expected.items())
        assert copied["lightning_curvature"]["factors"] == factors.digest()


def test_what_edits_take_is_told_where_it_is_more_than_a_tenth(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("lightning_curvature.trainer.callback.edit_seconds", lambda *shape: 40.0)
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

    monkeypatch.setattr("lightning_curvature.trainer.siblings._delete", stuck)
    saver = ModelCheckpoint(tmp_path / "c", filename="{step}", save_top_k=1, monitor="step", mode="max")
    with pytest.warns(UserWarning, match="PermissionError"):
        trainer = fit(tmp_path, Plain(), KFACEditCallback(), saver, max_epochs=2)
    assert trainer.state.finished
    assert {"step=16.ckpt", "step=16-edited.ckpt"} <= set(saved(tmp_path))


def test_the_edited_copy_says_how_far_it_moved(tmp_path):
    callback = KFACEditCallback(layers=["net.0", "net.2"], energy=0.7)
    fit(tmp_path, Plain(), callback, ModelCheckpoint(tmp_path / "c", filename="x"))
    facts = torch.load(tmp_path / "c" / "x-edited.ckpt", weights_only=True)["lightning_curvature"]
    told = {name: layer["relative_change"] for name, layer in facts["layers"].items()}
    assert told == {name: edit.relative_change for name, edit in callback.report.layers.items()}
    assert KroneckerFactors.load(tmp_path / "c" / "x-edited-factors.safetensors").digest() == facts["factors"]
