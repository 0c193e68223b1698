"""What a step may return and run, and what cannot be recorded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.collect.passes import collect
from tests.support.trunk import Net, factors, tokens


def test_what_a_step_may_return():
    model, (x, y) = Net().double(), tokens()
    loss = lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # noqa: E731
    plain = factors(model, loss)

    class Output:
        def __init__(self):
            self.loss = loss()

    for answer in (lambda: {"loss": loss(), "log": 1}, Output):
        torch.testing.assert_close(factors(model, answer).G, plain.G)
    for answer, kind in (
        (lambda: {"log": 1}, "dict"),
        (lambda: 1.0, "float"),
        (lambda: loss().expand(2), r"tensor \[2\]"),
    ):
        with pytest.raises(TypeError, match=f"must return the loss, one number, .* found a? ?{kind}"):
            factors(model, answer)


def test_a_layer_that_returns_a_tuple():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    class Paired(Net):
        def __init__(self):
            super().__init__()
            self.fc = Pair(5, 6)

        def forward(self, x):
            return self.head(torch.tanh(self.fc(x)[0]))

    model, (x, y) = Paired().double(), tokens()
    with pytest.raises(RuntimeError, match="Layer 'fc' returns a tuple, expected a tensor"):
        factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def test_transforms_of_torch_func():
    model, (x, y) = Net().double(), tokens()
    parameters = dict(model.named_parameters())
    call = lambda p, x: torch.func.functional_call(model, p, (x,))  # noqa: E731
    plain = factors(model, lambda: F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    functional = factors(model, lambda: F.cross_entropy(call(parameters, x).flatten(0, 1), y.flatten()))
    torch.testing.assert_close(functional.G, plain.G)
    with pytest.raises(RuntimeError, match=r"Layers 'fc' run inside a torch.func transform \(vmap"):
        factors(model, lambda: F.cross_entropy(torch.vmap(model)(x).flatten(0, 1), y.flatten()))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["exact", "sketched", "empirical"])
def test_rows_of_several_lengths(kind):
    model, y = Net().double(), torch.randint(0, 4, (10,))
    rows = [torch.randn(n, 5).double() for n in (3, 5, 2)]
    nested = lambda: torch.nested.nested_tensor(rows, layout=torch.jagged)  # noqa: E731
    together = lambda z: torch.cat(z.unbind())  # noqa: E731
    layer = factors(model, lambda: F.cross_entropy(together(model(nested())), y), fisher=kind)
    plain = factors(model, lambda: F.cross_entropy(model(torch.cat(rows)), y), fisher=kind)
    assert layer.num_inputs == 10
    torch.testing.assert_close(layer.A, plain.A)
    torch.testing.assert_close(layer.G, plain.G)
    with pytest.raises(RuntimeError, match="reads rows of several lengths"):
        factors(model, lambda: F.cross_entropy(together(model(nested())), y), positions="first")


@pytest.mark.parametrize("kind", ["exact", "sketched", "sampled"])
def test_an_empty_batch(kind):
    model = Net().double()
    x, y = torch.zeros(0, 5).double(), torch.zeros(0, dtype=torch.long)
    layer = collect(
        model,
        [x, torch.ones(2, 5).double()],
        lambda x: F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long), reduction="sum"),
        layers=["fc"],
        fisher=kind,
    )["fc"]
    assert layer.num_inputs == 2
    assert len(y) == 0
