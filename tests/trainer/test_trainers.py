"""Other callbacks in any order, precisions, compiled modules, graphs, and leaks."""

import gc
import weakref

import lightning.pytorch as pl
import psutil
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy, SingleDeviceXLAStrategy
from torch import nn
from torch.nn.utils import prune

from lightning_curvature import KFACEditCallback
from lightning_curvature.collect.collector import Collector
from lightning_curvature.collect.passes import collect
from lightning_curvature.recording.compiled import check_graphed
from lightning_curvature.recording.options import CollectorOptions
from lightning_curvature.trainer.refusals import check_strategy
from tests.support import models

pytestmark = pytest.mark.filterwarnings("ignore:The factors of layer .* rest on")


def test_strategies_that_change_what_a_module_holds_are_refused():
    class DeepSpeedStrategy(DDPStrategy):  # its own class needs a package
        pass

    check_strategy(SingleDeviceStrategy())
    check_strategy(DDPStrategy())
    with pytest.raises(
        MisconfigurationException, match=r"with FSDPStrategy, .* Use ModelParallelStrategy .* \(FSDP2\)"
    ):
        check_strategy(FSDPStrategy.__new__(FSDPStrategy))
    for strategy in (DeepSpeedStrategy(), SingleDeviceXLAStrategy.__new__(SingleDeviceXLAStrategy)):
        with pytest.raises(MisconfigurationException, match=r"does not work with .*Strategy, which .* Use DDPStrategy"):
            check_strategy(strategy)


# Other callbacks -----------------------------------------------------------------------------------------------------


class Tuned(models.Classifier):
    """What the tuners change, and a loss to watch."""

    def __init__(self):
        super().__init__()
        self.batch_size = 16

    def train_dataloader(self):
        return models.loader(models.images(128), self.batch_size)

    def val_dataloader(self):
        return models.loader(models.images(64, 1))

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss


OTHERS = {
    "ModelCheckpoint": lambda folder: ModelCheckpoint(folder / "c", save_last=True, every_n_train_steps=3),
    "EarlyStopping": lambda folder: EarlyStopping("val_loss", patience=1),
    "BatchSizeFinder": lambda folder: BatchSizeFinder(max_trials=2, steps_per_trial=1, init_val=8),
    "LearningRateFinder": lambda folder: LearningRateFinder(num_training_steps=5),
    "KFACEditCallback": lambda folder: KFACEditCallback(name="other", energy=0.5, fisher="empirical"),
}


@pytest.mark.filterwarnings(
    "ignore:.* in the `lr_find`", "ignore:Checkpoint directory", "ignore:The number of training"
)
@pytest.mark.filterwarnings("ignore:(A|The) checkpoint of step")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("loop", ["train", "validation"])
def test_other_callbacks_in_any_order(loop, name, first, tmp_path, caplog):
    """They leave the factors of their run alone: those of a run with the same data and weights without them."""
    neighbour, callback = OTHERS[name](tmp_path), KFACEditCallback(loop=loop, window=10_000)
    pl.seed_everything(0)
    module = Tuned()
    options = {} if name == "ModelCheckpoint" else {"enable_checkpointing": False}
    trainer = models.trainer(tmp_path, *([neighbour, callback] if first else [callback, neighbour]), **options)
    trainer.fit(module)

    alone = KFACEditCallback(loop=loop, window=10_000)
    pl.seed_everything(0)
    again = Tuned()
    again.batch_size, again.lr = module.batch_size, module.lr
    models.trainer(tmp_path, alone, enable_checkpointing=False, max_epochs=trainer.current_epoch).fit(again)
    assert callback.factors["net.3"].num_inputs == alone.factors["net.3"].num_inputs
    for weight, expected in zip(module.parameters(), again.parameters(), strict=True):
        assert torch.equal(weight, expected)
    for key, tensor in alone.factors["net.3"].tensors.items():
        assert torch.equal(callback.factors["net.3"].tensors[key], tensor)
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith((".lr_find", ".scale_batch"))]


@pytest.mark.parametrize("first", [True, False])
def test_pruning_is_refused(first, tmp_path):
    pruning = ModelPruning("l1_unstructured", amount=0.5)
    callbacks = [pruning, KFACEditCallback()] if first else [KFACEditCallback(), pruning]
    with pytest.raises(
        MisconfigurationException, match="an edit would fill the weights that ModelPruning sets to zero"
    ):
        models.trainer(tmp_path, *callbacks).fit(models.Classifier(), models.loader(models.images(32)))
    net = models.mlp()
    prune.l1_unstructured(net[3], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"Layer '3' .* is pruned .* prune.remove\(module, 'weight'\)"):
        Collector(net, CollectorOptions(layers=["3"]))


def test_averaging_sees_the_same_factors_in_either_order(tmp_path):
    collected = []
    for averaging_first in (True, False):
        pl.seed_everything(0)
        pair = [WeightAveraging(), KFACEditCallback(loop="validation")]
        callbacks = pair if averaging_first else pair[::-1]
        models.trainer(tmp_path, *callbacks, enable_checkpointing=False).fit(Tuned())
        collected.append(next(c for c in callbacks if isinstance(c, KFACEditCallback)).factors.digest())
    assert collected[0] == collected[1]


# Precision -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_loss_scale_is_taken_out_exactly_and_an_overflow_is_left_out(fisher):
    """As Lightning's float16 plugin does it: the loss is scaled, gradients are unscaled, an overflow is skipped."""
    images, labels = models.images(16).tensors

    def factors(scaler, overflow=False):
        torch.manual_seed(0)
        net = models.mlp()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        collector = Collector(net, CollectorOptions(layers=["1", "3"], fisher=fisher))
        for step in range(3):
            recording = collector.step()
            recording.open()
            loss = F.cross_entropy(net(images), labels)
            if overflow and step == 1:
                loss = loss * torch.tensor(3e38)  # with the scale it is infinite
            scaled = scaler.scale(loss)
            recording.before_backward(scaled)
            optimizer.zero_grad()
            scaled.backward()
            recording.close()
            scaler.step(optimizer)
            scaler.update()
        return collector, collector.factors()

    _, plain = factors(torch.amp.GradScaler("cpu", enabled=False))
    _, scaled = factors(torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1))
    for name, layer in plain.items():
        assert torch.equal(scaled[name].A, layer.A)
        assert torch.equal(scaled[name].G, layer.G)  # a power of two
    if fisher == "empirical":
        with pytest.warns(UserWarning, match="A batch with NaN or infinite activations or gradients was left out"):
            collector, left = factors(torch.amp.GradScaler("cpu", init_scale=2.0**16), overflow=True)
        assert collector.num_skipped == 1
        assert left["3"].num_inputs == 32
        assert left.provenance["batches_skipped"] == 1


@pytest.mark.parametrize("setting", ["medium", "high", "highest"])
def test_covariances_are_taken_in_full_precision(setting):
    rows = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Linear(256, 8), nn.Linear(8, 2))
    exact = rows.double().T @ rows.double() / 512
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        factors = collect(model, [rows], lambda x: F.cross_entropy(model(x), torch.zeros(512).long()), layers=["0"])
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    default = (rows.T @ rows / 512).double()
    assert (factors["0"].A.double() - exact).abs().max() <= 1.01 * (default - exact).abs().max()


# Compiled modules and graphs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["module", "part", "in place", "loss"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_compiled_modules_run_uncompiled_where_they_are_collected(fisher, what, tmp_path):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def fit(what):
        pl.seed_everything(0)
        module = models.Classifier("vit" if what == "part" else "mlp")
        if what == "part":
            module.net.blocks[1] = torch.compile(module.net.blocks[1], backend=backend)
        elif what == "in place":
            module.net.compile(backend=backend)
        elif what == "loss":
            module.criterion = torch.compile(nn.CrossEntropyLoss(), backend=backend)
            module.loss = "module"
        callback = KFACEditCallback(fisher=fisher, window=10_000)
        trainer = models.trainer(tmp_path, callback, enable_checkpointing=False, max_epochs=1)
        trainer.fit(
            torch.compile(module, backend=backend) if what == "module" else module, models.loader(models.images(64))
        )
        return callback

    with pytest.warns(UserWarning, match="run without torch.compile: .* collect in validation"):
        callback = fit(what)
    assert not compiled
    kind = "vit" if what == "part" else "mlp"
    pl.seed_everything(0)
    plain = KFACEditCallback(fisher=fisher, window=10_000)
    models.trainer(tmp_path, plain, enable_checkpointing=False, max_epochs=1).fit(
        models.Classifier(kind), models.loader(models.images(64))
    )
    for layer, expected in zip(callback.factors.values(), plain.factors.values(), strict=True):
        assert torch.equal(layer.A, expected.A)
        assert torch.equal(layer.G, expected.G)


def test_training_stays_compiled_where_validation_is_collected(tmp_path):
    runs = []

    def backend(graph, inputs):
        return lambda *given: runs.append(1) or graph.forward(*given)

    torch.compiler.reset()
    module = Tuned()
    module.net.compile(backend=backend)
    callback = KFACEditCallback(loop="validation", fisher="empirical")
    second = KFACEditCallback(loop="validation", name="second")
    with pytest.warns(UserWarning, match="run without torch.compile"):
        models.trainer(tmp_path, callback, second, enable_checkpointing=False).fit(module)
    assert len(runs) == 2 * 8  # the training steps of two epochs, and no step of validation
    assert callback.factors["net.3"].num_inputs == 64


def test_cuda_graphs_are_refused(monkeypatch):
    net = models.mlp()

    def make_graphed_callables():  # what torch.cuda's leaves on a module
        return lambda *inputs: None

    net[3].forward = make_graphed_callables()
    with pytest.raises(
        RuntimeError, match=r"Module '3' was captured in a CUDA graph \(torch.cuda.make_graphed_callables\)"
    ):
        check_graphed(net)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    net = models.mlp()
    with pytest.raises(RuntimeError, match="Layer '3' runs while a CUDA graph is captured"):
        collect(net, [models.images(4).tensors], lambda b: F.cross_entropy(net(b[0]), b[1]), layers=["3"])


def test_a_backward_pass_that_is_not_seen_is_told(tmp_path):
    class Unseen(models.Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            torch.autograd.backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.optimizers().step()

    trainer = models.trainer(tmp_path, KFACEditCallback(), enable_checkpointing=False)
    with (
        pytest.warns(UserWarning, match=r"no backward pass of it was seen, .* self.manual_backward\(loss\)"),
        pytest.warns(UserWarning, match="collected no data: no training step ran a backward pass"),
    ):
        trainer.fit(Unseen(), models.loader(models.images(32)))


# Leaks ---------------------------------------------------------------------------------------------------------------


class Witness:
    """Lives as long as the node of a graph that holds it."""


class Counter(pl.Callback):
    """Counts objects and memory in the course of a run."""

    def __init__(self):
        self.seen, self.graphs = [], []

    def on_before_backward(self, trainer, module, loss):
        if trainer.global_step % 997 == 0:
            loss.grad_fn.metadata["witness"] = kept = Witness()
            self.graphs.append(weakref.ref(kept))

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step in (2000, 10_000):
            gc.collect()
            hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in module.modules())
            self.seen.append((len(gc.get_objects()), psutil.Process().memory_info().rss, hooks))


def test_ten_thousand_steps_leave_nothing(tmp_path):
    counter = Counter()
    callbacks = [KFACEditCallback(fisher=fisher, name=fisher) for fisher in ("sketched", "empirical")]
    trainer = models.trainer(tmp_path, *callbacks, counter, max_steps=10_000, max_epochs=-1, enable_checkpointing=False)
    trainer.fit(models.Classifier(), models.loader(models.images(128), 4))
    (objects, memory, _), (more_objects, more_memory, hooks) = counter.seen
    assert more_objects - objects < 500
    assert more_memory - memory < 16 * 2**20
    assert hooks == 0
    gc.collect()
    assert len(counter.graphs) > 9
    assert all(graph() is None for graph in counter.graphs)
