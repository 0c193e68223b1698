"""The rows of one batch: which count, which are read, and which layers read the same ones."""

import pytest
import torch
from torch import nn

from lightning_curvature.recording.calls import BatchGradients, LayerCall
from lightning_curvature.recording.rows import read_batch, same_inputs

NAN = float("nan")


def call(name, inputs, module=None):
    """A call of a layer on inputs [..., d]; by default of a linear layer with two outputs."""
    module = nn.Linear(inputs.shape[-1], 2) if module is None else module
    with torch.no_grad():
        out = module(inputs)
    return LayerCall(name, module, inputs, inputs._version, None, out.shape, out.dtype)


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(calls, gradients, positions="contributing", **options):
    batch = BatchGradients(calls, gradients, **({"scales": [1.0] * len(calls)} | options))
    return read_batch(batch, positions)


def test_positions_with_a_gradient_count_and_their_rows_are_read():
    x, gradient = inputs(2, 3, 5), inputs(2, 3, 2, seed=1)
    gradient[0, 1] = gradient[1, 2] = 0
    (rows,) = read([call("fc", x)], [[gradient]])
    kept = [0, 2, 3, 4]
    assert (rows.num_counted, rows.num_seen) == (4, 6)
    assert torch.equal(rows.input_rows(), x.flatten(0, 1)[kept])
    (gradient_rows,) = rows.gradient_rows()
    assert torch.equal(gradient_rows, gradient.flatten(0, 1)[kept])


def test_a_position_counts_if_any_backward_pass_reaches_it():
    first, second = torch.zeros(4, 2), torch.zeros(4, 2)
    first[0], second[2] = 1, 1
    (rows,) = read([call("fc", inputs(4, 3))], [[first, second]])
    assert rows.index.tolist() == [0, 2]
    assert [part.sum().item() for part in rows.gradient_rows()] == [2, 2]


def test_all_positions_of_a_convolution_count():
    module = nn.Conv2d(2, 3, 2)
    x = inputs(1, 2, 3, 3)
    (rows,) = read([call("conv", x, module)], [[torch.zeros(1, 3, 2, 2)]])
    assert (rows.num_counted, rows.index) == (4, None)
    assert rows.input_rows().shape == (4, 8)


@pytest.mark.parametrize("positions", ["all", "contributing"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("where", ["inputs", "gradient", "a position that does not count"])
def test_a_batch_that_holds_a_value_that_is_not_finite_is_none(positions, value, where):
    x, gradient = inputs(4, 3), torch.zeros(4, 2)
    gradient[0] = 1
    if where == "gradient":
        gradient[0, 1] = value
    else:
        x[0 if where == "inputs" else 3, 1] = value
    assert read([call("fc", x)], [[gradient]], positions) is None


def test_scales_are_read_with_the_batch():
    scale = torch.tensor(2.0**-40 + 2.0**-90, dtype=torch.float64)
    rows = read([call("a", inputs(4, 3)), call("b", inputs(4, 3))], [[torch.ones(4, 2)]] * 2, scales=[scale, 0.5])
    assert [call_rows.scale for call_rows in rows] == [float(scale), 0.5]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_layers_of_the_same_rows_are_together(share):
    x, copy = inputs(64, 3), inputs(64, 3)
    calls = [call("query", x), call("key", x), call("copy", copy), call("other rows", x)]
    gradients = [[torch.ones(64, 2)] for _ in calls]
    gradients[3][0][:32] = 0
    groups = same_inputs(read(calls, gradients, share=share))
    assert [list(group) for group in groups] == [["query", "key"], ["copy"], ["other rows"]]


def test_a_tensor_that_was_changed_meanwhile_is_another_one():
    x = inputs(4, 3)
    first = call("first", x)
    x.add_(1)
    second = call("second", x)
    with pytest.raises(RuntimeError, match="Layer 'first': its input was changed in place"):
        read([first, second], [[torch.ones(4, 2)]] * 2)


def test_convolutions_of_other_patches_are_apart():
    x = inputs(1, 2, 4, 4)
    modules = {
        "a": nn.Conv2d(2, 3, 3, padding=1),
        "b": nn.Conv2d(2, 5, 3, padding=1),
        "c": nn.Conv2d(2, 3, 3, stride=1),
    }
    calls = [call(name, x, module) for name, module in modules.items()]
    gradients = [[torch.ones(made.output_shape)] for made in calls]
    assert [list(group) for group in same_inputs(read(calls, gradients))] == [["a", "b"], ["c"]]


def test_a_share_is_the_same_choice_for_layers_of_as_many_positions():
    calls = [call("a", inputs(400, 3)), call("b", inputs(400, 5)), call("c", inputs(100, 3))]
    gradients = [[torch.ones(made.output_shape)] for made in calls]
    first, second, third = read(calls, gradients, "all", share=0.25, seed=3)
    assert torch.equal(first.index, second.index)
    assert first.num_seen == first.num_counted == len(first.index)
    assert 70 < first.num_counted < 130
    assert third.num_counted < 50
    repeated, *_ = read(calls, gradients, "all", share=0.25, seed=3)
    changed, *_ = read(calls, gradients, "all", share=0.25, seed=4)
    assert torch.equal(repeated.index, first.index)
    assert not torch.equal(changed.counted, first.counted)


def test_layers_called_twice_are_compared_call_by_call():
    x, y = inputs(4, 3), inputs(4, 3, seed=1)
    up, gate = nn.Linear(3, 2), nn.Linear(3, 2)
    calls = [call("up", x, up), call("gate", x, gate), call("up", y, up), call("gate", x, gate)]
    groups = same_inputs(read(calls, [[torch.ones(4, 2)]] * 4))
    assert [list(group) for group in groups] == [["up"], ["gate"]]
    assert [len(group_calls) for group in groups for group_calls in group.values()] == [2, 2]
