"""Questions to the autograd graph, on graphs whose answer is seen at a glance."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_curvature.recording.graph import (
    ancestors,
    between,
    hides_its_operations,
    leaves_below,
    node_of,
    origin_of,
    path_below,
    reached,
    reaches,
    softmax_uses,
)


@pytest.fixture
def diamond():
    """A leaf, two branches of it, and what they come together to."""
    leaf = torch.ones(3, requires_grad=True)
    left, right = leaf.exp(), leaf.sin()
    return leaf, left, right, left * right


def names(nodes):
    return sorted(node.name().removesuffix("0").removesuffix("Backward") for node in nodes)


def origin(tensor, *modules):
    return origin_of(node_of(tensor), {id(parameter) for module in modules for parameter in module.parameters()})


def test_each_node_is_walked_once_and_the_barrier_is_not_passed(diamond):
    leaf, left, right, top = diamond
    walked = list(ancestors(top.grad_fn))
    assert walked[0] is top.grad_fn
    assert len(walked) == len(set(walked)) == 4
    assert node_of(leaf) in walked
    assert node_of(leaf) in list(ancestors(top.grad_fn, barrier=left.grad_fn))  # by the other branch
    assert list(ancestors(right.grad_fn, barrier=node_of(leaf))) == [right.grad_fn]
    assert list(ancestors(None)) == []


def test_goals_below_a_node_are_reached(diamond):
    leaf, left, right, top = diamond
    assert reaches(top.grad_fn, {node_of(leaf)})
    assert not reaches(left.grad_fn, {right.grad_fn})
    assert not reaches(left.exp().grad_fn, {node_of(leaf)}, barrier=left.grad_fn)
    assert reached(top.grad_fn, [left.grad_fn, node_of(leaf)]) == {left.grad_fn, node_of(leaf)}
    assert reached(left.grad_fn, [right.grad_fn, node_of(leaf)]) == {node_of(leaf)}
    assert reached(left.grad_fn, []) == set()


def test_what_lies_between_is_on_every_path_to_the_goal(diamond):
    leaf, left, right, top = diamond
    loss = (top + torch.ones(3, requires_grad=True).cos()).sum()  # a branch that does not lead to the leaf
    assert set(between(loss.grad_fn, node_of(leaf))) == {
        loss.grad_fn,
        loss.grad_fn.next_functions[0][0],
        top.grad_fn,
        left.grad_fn,
        right.grad_fn,
    }
    assert names(between(top.grad_fn, left.grad_fn)) == ["Mul"]
    assert between(left.grad_fn, right.grad_fn) == []


def test_leaves_below_a_tensor(diamond):
    leaf, _, _, top = diamond
    bias = torch.ones(3, requires_grad=True)
    assert {id(parameter) for parameter in leaves_below(top + bias)} == {id(leaf), id(bias)}
    assert [id(parameter) for parameter in leaves_below(leaf)] == [id(leaf)]


def test_the_origin_of_a_tensor_is_the_layer_below_whatever_views_it_went_through():
    layer, x = nn.Linear(4, 6), torch.randn(2, 3, 4)
    out = layer(x)
    plain, viewed, scaled = (origin(tensor, layer) for tensor in (out, out.flatten(0, 1)[:, :3].float(), 2 * out))
    assert plain.is_head_of(viewed)
    assert not plain.is_head_of(scaled)
    assert scaled.operations == ("Mul",)
    assert plain.parameters == frozenset(map(id, layer.parameters()))


def test_two_calls_of_a_layer_are_one_head_and_two_layers_are_two():
    first, second, x = nn.Linear(4, 6), nn.Linear(4, 6), torch.randn(3, 4)
    assert origin(first(x), first, second).is_head_of(origin(first(x + 1), first, second))
    assert not origin(first(x), first, second).is_head_of(origin(second(x), first, second))


def test_a_frozen_layer_is_told_by_its_weight():
    first, second = (nn.Linear(4, 6).requires_grad_(False) for _ in range(2))
    x = torch.randn(3, 4, requires_grad=True)
    assert origin(first(x), first, second).is_head_of(origin(first(x), first, second))
    assert not origin(first(x), first, second).is_head_of(origin(second(x), first, second))


def test_where_no_parameters_are_known_alike_operations_look_alike():
    x, y = (torch.randn(3, 4, requires_grad=True) * 2 for _ in range(2))
    assert origin(x.exp()).looks_like(origin(y.exp()))
    assert not origin(x.exp()).looks_like(origin(y.sin()))


SOFTMAXES = {
    "softmax": lambda z: z.softmax(1),
    "log-softmax": lambda z: z.log_softmax(1),
    "a negative dimension": lambda z: F.softmax(z, -1),
    "cross-entropy": lambda z: F.cross_entropy(z, torch.tensor([0, 1])),
    "a normaliser": lambda z: z.logsumexp(1),
}


@pytest.mark.parametrize("kind", SOFTMAXES)
def test_the_softmax_that_a_tensor_goes_into_is_found_with_its_classes(kind):
    z = torch.randn(2, 5, requires_grad=True) * 1
    (use,) = softmax_uses(between(SOFTMAXES[kind](z).sum().grad_fn, z.grad_fn))
    assert (use.shape, use.dim, use.classes) == ((2, 5), 1, 5)


def test_a_normaliser_over_everything_is_no_softmax():
    z = torch.randn(2, 5, requires_grad=True) * 1
    assert softmax_uses(between(z.logsumexp((0, 1)).grad_fn, z.grad_fn)) == []


def test_a_path_tells_what_is_more_than_a_view_and_whether_dimensions_are_exchanged():
    z = torch.randn(2, 5, 3, requires_grad=True) * 1
    assert path_below(z[:, 1:].flatten().sum().grad_fn, z.grad_fn) == ([], False)
    assert path_below(z.transpose(1, 2).exp().sum().grad_fn, z.grad_fn) == (["Exp"], True)


def test_a_function_of_ones_own_hides_its_operations():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    z = torch.randn(2, requires_grad=True) * 1
    assert hides_its_operations(between(Twice.apply(z).sum().grad_fn, z.grad_fn))
    assert not hides_its_operations(between((2 * z).sum().grad_fn, z.grad_fn))
