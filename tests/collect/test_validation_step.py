"""Graphs of a validation step: dropped with their batch, and from whatever holds them."""

import collections
import copy
import dataclasses
import gc
import weakref

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torchmetrics import CatMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_curvature import KFACEditCallback
from lightning_curvature.collect.validation_step import drop_graphs, graphs
from tests.support import models


class Keeper(models.Classifier):
    """Keeps outputs wherever one can, and reads them in ways that gradients forbid."""

    def __init__(self):
        super().__init__()
        self.cat, self.accuracy = CatMetric(), MulticlassAccuracy(4)
        self.outputs, self.by_name, self.pairs = [], {}, ()

    def validation_step(self, batch, batch_idx):
        logits = Witness.apply(self(batch[0]))
        loss = F.cross_entropy(logits, batch[1])
        self.cat.update(logits[:, 0])
        self.accuracy(logits, batch[1])
        self.outputs.append(logits)
        self.by_name["views"] = [logits[:, 1:], {"loss": loss}]
        self.pairs = (1, logits.exp())
        self.array = logits.numpy() + np.asarray(logits) + float(loss) + loss.item()
        self.log("val_loss", loss)
        return {"loss": loss, "logits": logits}

    def on_validation_epoch_end(self):
        assert not torch.cat(self.outputs).requires_grad
        self.log("mean", torch.cat(self.outputs).numpy().mean())


class Witness(torch.autograd.Function):
    """Identity whose context dies with the graph."""

    contexts = ()

    @staticmethod
    def forward(ctx, x):
        Witness.contexts = (*Witness.contexts, weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def test_no_graph_outlives_its_batch(tmp_path):
    Witness.contexts = ()
    alive = []

    class Watch(pl.Callback):
        def __init__(self):
            self.outputs = []

        def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
            self.outputs.append(outputs)
            assert not outputs["loss"].requires_grad
            gc.collect()
            alive.append(sum(reference() is not None for reference in Witness.contexts))

    module, callback = Keeper(), KFACEditCallback(energy=0.85)
    watch = Watch()
    models.trainer(tmp_path, callback, watch).validate(module, models.loader(models.images(96)), verbose=False)
    assert len(Witness.contexts) == 3
    assert alive == [0, 0, 0]
    assert len(module.outputs) == 3
    assert not module.pairs[1].requires_grad
    assert callback.factors["net.3"].num_inputs == 96


@dataclasses.dataclass(frozen=True)
class Record:
    logits: torch.Tensor
    number: int = 3


Pair = collections.namedtuple("Pair", "one two")


class Frozen(dict):
    def __setitem__(self, key, value):
        raise TypeError("frozen")


def test_drop_graphs_reaches_every_container_and_keeps_objects_that_need_no_change():
    module = torch.nn.Linear(2, 2)
    leaf = torch.ones(2, requires_grad=True)
    graph = leaf * 2
    module.register_buffer("total", graph.sum())
    module.kept, module.leaf, module.pair = [1, "a", (2, 3)], [leaf], (graph, 1)
    module.frozen, module.number = Frozen(a=1), 7
    module.named, module.queue, module.record = Pair(graph, 2), collections.deque([graph, 1]), Record(graph)
    module.loop = {"a": [graph]}
    module.loop["self"] = module.loop
    module.again = module.pair
    kept, frozen, loop, queue = module.kept, module.frozen, module.loop, module.queue
    before = graphs(module)
    assert len(before) == 6
    drop_graphs(module, before)
    assert module.pair[0] is graph  # it was there before
    drop_graphs(module)
    assert not graphs(module)
    assert module.kept is kept
    assert module.frozen is frozen
    assert module.loop is loop
    assert module.queue is queue
    assert module.leaf[0] is leaf
    assert isinstance(module.named, Pair)
    assert module.record.number == 3
    assert module.again is module.pair  # what was one tuple is one
    for value in (module.total, module.pair[0], module.named.one, module.queue[0], module.record.logits, loop["a"][0]):
        assert not value.requires_grad
    assert module.weight.requires_grad


def test_graphs_that_training_still_needs_stay(tmp_path):
    """Manual optimization that collects losses over several batches, with a validation in their midst."""

    class Pending(models.Validated):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.pending = []

        def training_step(self, batch, batch_idx):
            self.pending.append(F.cross_entropy(self(batch[0]), batch[1]))
            if len(self.pending) == 4:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(torch.stack(self.pending).sum())
                optimizer.step()
                self.pending = []

    def fit(*callbacks):
        pl.seed_everything(0)
        module = Pending()
        trainer = models.trainer(tmp_path, *callbacks, max_epochs=1, val_check_interval=2, enable_checkpointing=False)
        trainer.fit(module, models.loader(models.images(128), 16), models.loader(models.images(32)))
        return module.state_dict()

    plain = fit()
    assert all(torch.equal(v, plain[k]) for k, v in fit(KFACEditCallback(loop="validation")).items())


def test_a_step_without_a_batch_index_and_with_odd_reads(tmp_path):
    class One(models.Classifier):
        def validation_step(self, batch):
            logits = self(batch[0])
            assert np.allclose(np.from_dlpack(logits), copy.deepcopy(logits).numpy())
            self.record = Record(F.cross_entropy(logits, batch[1]))
            return self.record

    module, callback = One(), KFACEditCallback()
    models.trainer(tmp_path, callback).validate(module, models.loader(models.images(64)), verbose=False)
    assert callback.factors["net.3"].num_inputs == 64
    assert not module.record.logits.requires_grad
