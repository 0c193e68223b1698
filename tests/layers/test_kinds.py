import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torchvision import tv_tensors
from transformers.pytorch_utils import Conv1D

from lightning_curvature.layers.kinds import (
    as_matrix,
    conv_patches,
    from_matrix,
    gradient_rows,
    has_lazy,
    input_rows,
    is_conv1d,
    is_editable,
    is_lazy,
    is_packed,
    matrix_shape,
    refusal,
)
from lightning_curvature.layers.modules import find_layer, layer_weights

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 2, "padding": "same", "dilation": 3},
    {"kernel_size": 3, "padding": "valid", "dilation": (1, 2)},
    {"kernel_size": 3, "padding": 2, "padding_mode": "reflect", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_patches_times_weight_is_the_convolution(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, bias=False, **options).double()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    output = conv(x)
    rows = conv_patches(conv, x) @ as_matrix(conv.weight).T
    torch.testing.assert_close(rows, gradient_rows(conv, output))
    torch.testing.assert_close(input_rows(conv, x[0]) @ as_matrix(conv.weight).T, gradient_rows(conv, conv(x[0])))


@pytest.mark.parametrize("layer", [nn.Linear(4, 3, bias=False), Conv1D(3, 4)], ids=["Linear", "Conv1D"])
def test_rows_times_weight_is_the_layer(layer):
    if is_conv1d(layer):
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 5, 4)
    matrix = as_matrix(layer.weight, is_conv1d(layer))
    assert matrix.shape == (3, 4)
    torch.testing.assert_close(input_rows(layer, x) @ matrix.T, gradient_rows(layer, layer(x)))
    back = from_matrix(matrix, layer.weight, is_conv1d(layer))
    torch.testing.assert_close(back, layer.weight.data, check_stride=True)
    assert back.data_ptr() != layer.weight.data_ptr()


def test_what_can_be_edited():
    assert is_editable(nn.Conv2d(2, 2, 3))
    assert not is_editable(nn.LayerNorm(3))
    assert refusal(nn.LayerNorm(3)) is None
    assert "grouped convolution" in refusal(nn.Conv2d(2, 2, 3, groups=2))
    assert "Conv1d is not supported" in refusal(nn.Conv1d(2, 2, 3))


def with_weight(weight, layer=None):
    """Put something else in the place of a layer's weight."""
    layer = nn.Linear(4, 3) if layer is None else layer
    del layer.weight
    layer.weight = weight
    return layer


def hypernetwork():
    """A layer whose weight another one makes anew before each forward pass."""
    layer, maker = with_weight(torch.zeros(3, 4)), nn.Linear(1, 12)
    layer.register_forward_pre_hook(lambda m, args: setattr(m, "weight", maker(torch.ones(1)).view(3, 4)))
    return layer


def as_buffer():
    layer = nn.Linear(4, 3)
    del layer.weight
    layer.register_buffer("weight", torch.zeros(3, 4))
    return layer


class Property(nn.Linear):
    """The weight is computed where it is read."""

    def __init__(self):
        super().__init__(4, 3)
        self._parameters["raw"] = self._parameters.pop("weight")

    @property
    def weight(self):
        return self.raw.tanh()


class Codes(torch.Tensor):
    """A tensor that says float32 and holds bytes, with operators of its own, as quantization libraries make them."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes):
        self.codes = codes

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(func)


def coded():
    return with_weight(nn.Parameter(Codes(torch.zeros(3, 4, dtype=torch.int8)), requires_grad=False))


def sparse():
    return with_weight(nn.Parameter(torch.eye(4).to_sparse(), requires_grad=False), nn.Linear(4, 4))


REFUSED = {
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), "torch.nn.utils.remove_weight_norm"),
    "weight_norm, convolution": (lambda: nn.utils.weight_norm(nn.Conv2d(2, 3, 3)), "remove_weight_norm"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), "torch.nn.utils.remove_spectral_norm"),
    "spectral_norm, convolution": (lambda: nn.utils.spectral_norm(nn.Conv2d(2, 3, 3)), "remove_spectral_norm"),
    "parametrizations.weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        r"a parametrization \(WeightNorm\); .*remove_parametrizations",
    ),
    "parametrizations.spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), r"\(SpectralNorm\)"),
    "parametrizations.orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), r"\(Orthogonal\)"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5), "pruned .*prune.remove"),
    "hypernetwork": (hypernetwork, "no parameter of its own but an attribute"),
    "property": (Property, "no parameter of its own"),
    "buffer": (as_buffer, "no parameter of its own but a buffer"),
    "none": (lambda: with_weight(None), "its weight is None|no parameter"),
    "meta": (lambda: nn.Linear(4, 3, device="meta"), "on the meta device"),
    "integers": (
        lambda: with_weight(nn.Parameter(torch.zeros(3, 4, dtype=torch.uint8), requires_grad=False)),
        r"packed or quantized \(torch.uint8\)",
    ),
    "float8": (
        lambda: with_weight(nn.Parameter(torch.zeros(3, 4).to(torch.float8_e4m3fn), requires_grad=False)),
        r"packed or quantized \(torch.float8_e4m3fn\)",
    ),
    "packed floats": (
        lambda: with_weight(nn.Parameter(torch.zeros(3, 1, dtype=torch.bfloat16), requires_grad=False)),
        r"packed or quantized \(Parameter \[3, 1\] in a layer of \[3, 4\]\)",
    ),
    "complex": (lambda: nn.Linear(4, 3, dtype=torch.complex64), "torch.complex64"),
    "sparse": (sparse, r"packed or quantized \(torch.sparse_coo\)"),
    "wrapper": (coded, r"packed or quantized \(Codes, torch.float32\)"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_is_no_matrix_of_its_own_is_refused_by_what_it_is(case):
    make, words = REFUSED[case]
    layer = make()
    assert re.search(words, refusal(layer))
    assert not is_editable(layer)
    net = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ValueError, match="Layer '1' cannot be edited: it"):
        find_layer(net, "1")


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_weights_of_torchao(kind):
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(64, 64)
    quantization.quantize_(layer, getattr(quantization, kind)())
    assert layer.weight.dtype is torch.float32
    assert re.search(rf"packed or quantized \({type(layer.weight).__name__}, torch.float32\)", refusal(layer))


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
        (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_the_remedies_work(wrap, remedy):
    layer = wrap(nn.Linear(4, 3))
    assert refusal(layer)
    remedy(layer)
    assert is_editable(layer)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_another_parameter_may_be_normalised_or_pruned():
    for layer in (
        prune.l1_unstructured(nn.Linear(4, 3), "bias", 1),
        nn.utils.weight_norm(nn.Linear(4, 3), "bias", dim=None),
    ):
        assert refusal(layer) is None


class Plain(nn.Parameter):
    """A subclass that adds nothing to what its entries are."""


class Named(torch.Tensor):
    """A subclass that watches functions alone, as image and audio tensors of several libraries do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_harmless_subclasses_are_editable():
    layer = with_weight(Plain(torch.randn(3, 4)))
    assert type(layer.weight) is Plain
    assert is_editable(layer)
    for kind in (Named, tv_tensors.Image):
        layer = nn.Linear(4, 3)
        layer._parameters["weight"] = torch.zeros(3, 4).as_subclass(kind)
        assert not is_packed(layer)


def test_lazy_layers_may_be_edited_once_they_have_a_shape():
    for layer, x, shape in [
        (nn.LazyLinear(3), torch.zeros(2, 4), (3, 4)),
        (nn.LazyConv2d(3, 2), torch.zeros(2, 5, 6, 6), (3, 20)),
    ]:
        net = nn.Sequential(layer)
        assert is_lazy(layer)
        assert has_lazy(net)
        assert is_editable(layer)
        with pytest.raises(RuntimeError, match="has no shape before it runs"):
            matrix_shape(layer)
        net(x)
        assert not is_lazy(layer)
        assert not has_lazy(net)
        assert is_editable(layer)
        assert matrix_shape(layer) == shape
    assert has_lazy(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    assert not has_lazy(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d()))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_goes_while_a_run_goes_on_is_named():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.weight_norm(net[1])
    assert layer_weights(net, ["0"])["0"] is net[0].weight
    with pytest.raises(ValueError, match=r"Layer '1' cannot be edited: .*remove_weight_norm"):
        layer_weights(net, ["0", "1"])
