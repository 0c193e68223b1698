"""What the processes of the tests do: one run of a Trainer, and what it leaves."""

import os
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_curvature import KFACEditCallback, KroneckerFactors
from tests.support import models

LAYERS = ["net.1", "net.3"]
IMAGES, BATCH = 48, 12
STRATEGIES = {
    "one process": (1, lambda: "auto", ()),
    "DDP, 2 processes": (2, lambda: DDPStrategy(), ()),
    "DDP, 3 processes": (3, lambda: DDPStrategy(), ()),
    "FSDP2 (`ModelParallelStrategy`), 2 processes": (2, lambda: ModelParallelStrategy(2, 1), ("fsdp2",)),
    "tensor parallel (`ModelParallelStrategy`), 2 processes": (2, lambda: ModelParallelStrategy(1, 2), ("tensor",)),
    "FSDP2 and tensor parallel, 4 processes": (4, lambda: ModelParallelStrategy(2, 2), ("fsdp2", "tensor")),
}


class Net(pl.LightningModule):
    """A classifier of small images; options change how it is trained, and none of them its factors.

    Args:
        parallel: ``"fsdp2"``, ``"tensor"``, or both, applied in configure_model.
        manual: Manual optimization, by ``"raw"`` backward passes or Lightning's own.
        checkpointing: Activation checkpointing, ``"reentrant"`` or ``"non-reentrant"``.
        data: What it is trained on and validated on.
    """

    def __init__(self, parallel=(), manual=None, checkpointing=None, lr=0.05, data=None):
        super().__init__()
        self.parallel, self.manual, self.checkpointing, self.lr = parallel, manual, checkpointing, lr
        self.data = models.images(IMAGES) if data is None else data
        self.automatic_optimization = manual is None
        torch.manual_seed(0)
        # No in-place activations: tensor parallelism has none.
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
        )

    def configure_model(self):
        if "tensor" in self.parallel:
            plan = {"1": ColwiseParallel(), "3": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
        if "fsdp2" in self.parallel:
            for part in (self.net[1], self.net[3], self.net):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def loader(self):
        part = getattr(self.trainer, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(self.data, shuffle=False, **part)
        return DataLoader(self.data, BATCH // part["num_replicas"], sampler=sampler)

    train_dataloader = val_dataloader = loader

    def forward(self, x):
        if self.checkpointing is None:
            return self.net(x)
        x = x.requires_grad_(self.checkpointing == "reentrant")
        return checkpoint(self.net, x, use_reentrant=self.checkpointing == "reentrant")

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.manual is None:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss.backward() if self.manual == "raw" else self.manual_backward(loss)
        optimizer.step()
        return None

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def run(loop, fisher, strategy="one process", module=None, callbacks=(), folder=None, kind=Net, **options):
    """Run a Trainer with a KFACEditCallback; return what it leaves on this process.

    Returns:
        The factors ``{layer: (A, G, num_inputs, num_gradients)}`` of the factor file, and the edited weights of the
        checkpoint's sibling (only of a run that saves one).
    """
    size, make, parallel = STRATEGIES[strategy]
    settings = {
        key: options.pop(key) for key in ("draws", "window", "shard_factors", "target", "loop") if key in options
    }
    folder = Path(tempfile.gettempdir(), f"{os.environ.get('MASTER_PORT')}") if folder is None else Path(folder)
    saved = folder / "factors.safetensors"
    settings = {"window": 10_000, **({} if "target" in settings else {"energy": 0.85}), **settings}
    callback = KFACEditCallback(LAYERS, fisher=fisher, save_factors=str(saved), **settings)
    callback.editor.min_positions = 0  # the first layer has more inputs than there are images
    options = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "limit_val_batches": 0 if loop == "fit" else None,
        "use_distributed_sampler": False,
    } | options
    trainer = models.trainer(folder, callback, *callbacks, devices=size, strategy=make(), **options)
    getattr(trainer, loop)(kind(parallel, **(module or {})))
    trainer.strategy.barrier()
    if callback.problem is not None:
        raise RuntimeError(callback.problem)
    return trainer, callback, KroneckerFactors.load(saved)


def refused(error):
    """Return an error as a cell of the table: its first sentence."""
    return "refused: " + str(error).split(". ")[0].rstrip(".") + "."


def factors_of(strategy, loop, fisher, folder, **options):
    """Return the factors of a run by layer, and the relative change of its edit; or why it was refused."""
    try:
        _, callback, factors = run(loop, fisher, strategy, folder=folder, **options)
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        return refused(error)
    edits = {name: edit.relative_change for name, edit in callback.report.layers.items()}
    return {
        name: (layer.A, layer.G, layer.num_inputs, layer.num_gradients, edits[name]) for name, layer in factors.items()
    }


def kinds(strategy, folder):
    """Run every kind of Fisher in both loops."""
    return {
        (loop, fisher): factors_of(
            strategy, loop, fisher, Path(folder, loop, fisher), draws=50 if fisher in ("sketched", "sampled") else 1
        )
        for loop in ("fit", "validate")
        for fisher in ("sketched", "sampled", "exact", "empirical")
    }


class TwoOptimizers(Net):
    """Manual optimization with an optimizer for each half of the network."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(0.3 * F.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net[i].parameters(), lr=self.lr) for i in (1, 3)]


class Compiled(Net):
    """A network of which parts are compiled."""

    def configure_model(self):
        super().configure_model()
        self.net[1].compile(backend="aot_eager")
        self.net.forward = torch.compile(self.net.forward, backend="aot_eager")


class Offloaded(Net):
    """Activations are kept on the CPU between the forward and the backward pass."""

    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return super().forward(x)


OPTIONS = {
    '`precision="64-true"`': {"precision": "64-true"},
    '`precision="bf16-mixed"`': {"precision": "bf16-mixed"},
    '`precision="bf16-true"`': {"precision": "bf16-true"},
    "`accumulate_grad_batches=2`": {"accumulate_grad_batches": 2},
    "`GradientAccumulationScheduler`": {
        "callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 3})],
        "max_epochs": 2,
    },
    "`gradient_clip_val`": {"gradient_clip_val": 1e-3},
    "manual optimization, `manual_backward`": {"module": {"manual": "lightning"}},
    "manual optimization, `loss.backward()`": {"module": {"manual": "raw"}},
    "manual optimization, several optimizers": {"kind": TwoOptimizers},
    "activation checkpointing, non-reentrant": {"module": {"checkpointing": "non-reentrant"}},
    "activation checkpointing, reentrant": {"module": {"checkpointing": "reentrant"}},
    "activation offload (`save_on_cpu`)": {"kind": Offloaded},
    "`torch.compile` of parts": {"kind": Compiled},
    "`shard_factors=True`": {"shard_factors": True},
}


def options(strategy, folder):
    """Run every option of OPTIONS on weights that do not move, whose factors are the same under all of them."""
    cells = {}
    for index, (name, given) in enumerate({"plain": {}, **OPTIONS}.items()):
        for fisher in ("exact", "empirical"):
            arguments = {
                **given,
                "callbacks": given.get("callbacks", list)(),
                "module": {"lr": 0.0, **given.get("module", {})},
            }
            cells[name, fisher] = factors_of(strategy, "fit", fisher, Path(folder, str(index), fisher), **arguments)
    return cells


def random_sums(strategy):
    """Return what one process alone has summed of data that all have."""
    same = TensorDataset(*(tensor[:1].expand(IMAGES, *tensor.shape[1:]) for tensor in models.images(1).tensors))
    _, callback, _ = run("validate", "sketched", strategy, module={"data": same})
    sums = callback.run.windows.complete
    return {name: (layer.A, layer.G) for name, layer in sums.items()}
