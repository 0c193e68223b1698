"""Which loss of a step counts, and what is no loss."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.steps import data, gather, network, same

WAYS = {
    "a module": lambda z, y: nn.CrossEntropyLoss()(z, y),
    "keywords": lambda z, y: nn.CrossEntropyLoss()(input=z, target=y),
    "NLL of log-softmax": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "modules of both": lambda z, y: nn.NLLLoss()(nn.LogSoftmax(-1)(z), y),
    "weights and smoothing": lambda z, y: F.cross_entropy(z, y, weight=torch.ones(3).double(), label_smoothing=0.2),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_ways_to_write_the_loss(way):
    model, (x, y) = network(), data()
    expected = gather(model, lambda _: F.cross_entropy(model(x), y), fisher="exact")
    same(gather(model, lambda _: WAYS[way](model(x), y), fisher="exact"), expected)


def test_a_metric_is_not_the_loss():
    model, (x, y) = network(), data()

    def step(_):
        logits = model(x)
        with torch.no_grad():
            F.cross_entropy(logits, y)
        F.cross_entropy(logits.detach(), y)
        F.cross_entropy(logits, y, label_smoothing=0.5)  # has a graph, but does not reach the training loss
        return F.cross_entropy(logits, y)

    same(gather(model, step), gather(model, lambda _: F.cross_entropy(model(x), y)))


def test_named_logits_of_a_submodule_and_of_a_method():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def logits(self, x):
            return self.net(x)

        def loss(self, x, y):
            return -(self.logits(x).softmax(-1).gather(1, y[:, None])).log().mean()

    model, (x, y) = Hidden(), data()
    expected = gather(model, lambda _: F.cross_entropy(model.net(x), y), layers=["net.2"], fisher="exact")
    for name in ("net.4", "net", "logits"):
        factors = gather(model, lambda _: model.loss(x, y), layers=["net.2"], fisher="exact", logits=name)
        same(factors, expected)
    model.logits = model.logits  # an own attribute comes back too
    gather(model, lambda _: model.loss(x, y), layers=["net.2"], fisher="exact", logits="logits")
    assert model.logits.__name__ == "logits"
    with pytest.raises(ValueError, match=r"logits='logit' is neither a submodule nor a method of Hidden. Did you mean"):
        gather(model, lambda _: model.loss(x, y), layers=["net.2"], logits="logit")
    model.loss_pair = lambda: (1, 2)
    with pytest.raises(TypeError, match="logits='loss_pair' returned tuple"):
        gather(model, lambda _: model.loss_pair(), layers=["net.2"], logits="loss_pair")


@pytest.mark.parametrize("name", ["l1_loss", "huber_loss", "multilabel_soft_margin_loss"])
def test_losses_of_unknown_curvature_are_refused_by_name(name):
    model, (x, y) = network(), data()
    loss, hot = getattr(F, name), F.one_hot(y, 3).double()
    with pytest.raises(
        RuntimeError, match=f"No loss whose curvature is known reaches the training loss. It computes '{name}'"
    ):
        gather(model, lambda _: loss(model(x), hot))


def test_two_losses_and_values_that_are_no_log_probabilities_are_refused():
    model, (x, y) = network(), data()
    with pytest.raises(RuntimeError, match=r"2 losses reach .* logits='...'"):
        gather(model, lambda _: F.cross_entropy(model(x), y) + F.cross_entropy(2 * model(x), y))
    with pytest.raises(RuntimeError, match="values that are not log-probabilities"):
        gather(model, lambda _: F.nll_loss(model(x), y))
