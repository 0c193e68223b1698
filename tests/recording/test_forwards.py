"""Layers that compute something else than rows times weight plus bias are told from those that do not."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from lightning_curvature.recording.forwards import check_forward, rows_agree


class Normed(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x, dim=-1), self.weight, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1 / math.sqrt(self.in_features))


class EqualizedRate(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Activated(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class Dropping(nn.Linear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, training=True)


class Masked(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.tril(), self.bias)


class LowRank(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


class Quantized(nn.Linear):
    def forward(self, x):
        step = self.weight.abs().max() / 127
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x), super().forward(x)])


class BiasTwice(nn.Linear):
    def forward(self, x):
        return super().forward(x) + self.bias


class Flipped(nn.Linear):
    """Positions come out in another order."""

    def forward(self, x):
        return super().forward(x).flip(0)


class Wordy(nn.Linear):
    """Another way to say the same."""

    def forward(self, input, *, note=None):
        return torch.einsum("...i,oi->...o", input, self.weight) + self.bias


class InFloat32(nn.Linear):
    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).float()


class Conv2dSame(nn.Conv2d):
    """Padding of TensorFlow, computed from the image; the attribute says 0."""

    def forward(self, x):
        sizes = zip(x.shape[-2:], self.kernel_size, self.stride, strict=True)
        p = [max((math.ceil(i / s) - 1) * s + k - i, 0) for i, k, s in sizes]
        x = F.pad(x, [p[1] // 2, p[1] - p[1] // 2, p[0] // 2, p[0] - p[0] // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = F.instance_norm(self.weight.flatten(1)[None])[0].view_as(self.weight)
        return F.conv2d(x, weight, self.bias)


class ConvNormed(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.instance_norm(x))


class Reflected(nn.Conv2d):
    """Padding of one's own, of the size that the attribute says."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), self.weight, self.bias)


class Shifted(nn.Conv2d):
    """As many pixels of padding, all of them on one side."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 2, 0, 2)), self.weight, self.bias)


class TailPadded(nn.Conv2d):
    """Right but for the last row of pixels."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y[..., :-1, :], torch.zeros_like(y[..., -1:, :])], -2)


OTHER = [
    lambda: Normed(24, 16),
    lambda: Scaled(24, 16),
    lambda: EqualizedRate(24, 16),
    lambda: Activated(24, 16),
    lambda: Dropping(24, 16),
    lambda: Masked(24, 16),
    lambda: LowRank(24, 16),
    lambda: Quantized(24, 16),
    lambda: Doubled(24, 16),
    lambda: BiasTwice(24, 16),
    lambda: Flipped(24, 16),
]
OTHER_CONVOLUTIONS = [
    lambda: Standardized(3, 5, 3),
    lambda: ConvNormed(3, 5, 3, padding=1),
    lambda: Reflected(3, 5, 3, padding=1),
    lambda: Shifted(3, 5, 3, padding=1),
    lambda: TailPadded(3, 5, 3, padding=1),
    lambda: Conv2dSame(3, 5, 3, stride=2),
]
RIGHT = [
    lambda: nn.Linear(24, 16),
    lambda: nn.Linear(24, 16, bias=False),
    lambda: Conv1D(16, 24),
    lambda: Wordy(24, 16),
    lambda: FalconLinear(24, 16),
    lambda: InFloat32(24, 16),
    lambda: nn.Linear(24, 1000),
]
RIGHT_CONVOLUTIONS = [
    lambda: nn.Conv2d(3, 5, 3),
    lambda: nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(1, 0), bias=False),
    lambda: nn.Conv2d(3, 5, 3, padding="same", dilation=2),
    lambda: nn.Conv2d(3, 5, 3, padding=1, stride=2),
    lambda: nn.Conv2d(3, 5, 2, padding=2, padding_mode="reflect"),
    lambda: nn.Conv2d(3, 5, 9, padding=4),
    lambda: nn.Conv2d(3, 5, 1, stride=3),
    lambda: Conv2dSame(3, 5, 1),
    lambda: nn.Conv2d(3, 5, 3, padding="valid"),
]


def linear_input(dtype=torch.float32):
    return torch.randn(3, 50, 24, dtype=dtype, generator=torch.Generator().manual_seed(1))


def image(batch=2):
    return torch.randn(batch, 3, 13, 11, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("make", RIGHT, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_multiplies_rows_by_its_weight_is_right(make, dtype):
    layer, x = make().to(dtype), linear_input(dtype)
    nn.init.normal_(layer.weight)
    for inputs in (x, x[0], x[0, 0]):
        assert check_forward(layer, inputs, layer(inputs)) is None


@pytest.mark.parametrize("make", RIGHT_CONVOLUTIONS, ids=lambda make: type(make()).__name__)
def test_convolutions_are_right(make):
    layer = make()
    for inputs in (image(), image()[0]):
        assert check_forward(layer, inputs, layer(inputs)) is None
        assert rows_agree(layer, inputs, layer(inputs).shape)


@pytest.mark.parametrize("make", OTHER, ids=lambda make: type(make()).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_another_forward_is_told_with_its_class(make, dtype):
    layer, x = make().to(dtype), linear_input(dtype)
    assert type(layer).__name__ in check_forward(layer, x, layer(x))


@pytest.mark.parametrize("make", OTHER_CONVOLUTIONS, ids=lambda make: type(make()).__name__)
def test_another_convolution_is_told_with_its_class(make):
    layer = make()
    assert f"(class {type(layer).__name__} overrides forward)" in check_forward(layer, image(), layer(image()))


@pytest.mark.parametrize("kind", [Normed, Scaled, Activated, Dropping, Masked, Flipped])
@pytest.mark.parametrize("width", [24, 2048])
def test_it_is_told_in_half_precision_and_under_autocast(kind, width):
    layer, x = kind(width, 32), torch.randn(100, width)
    for dtype in (torch.bfloat16, torch.float16):
        half = kind(width, 32).to(dtype)
        assert check_forward(half, x.to(dtype), half(x.to(dtype))) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert check_forward(layer, x, layer(x)) is not None
        plain = nn.Linear(width, 32)
        assert check_forward(plain, x, plain(x)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 512, 8192])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rounding_is_no_difference(dtype, width, offset):
    """Neither long sums nor sums of terms of one sign, nor ones that cancel."""
    layer = nn.Linear(width, 16).to(dtype)
    x = (torch.randn(70, width) + offset).to(dtype)
    assert check_forward(layer, x, layer(x)) is None
    assert check_forward(layer, x.T.contiguous().T, layer(x)) is None
    nn.init.constant_(layer.weight, 0.01)
    assert check_forward(layer, x, layer(x)) is None


class Widened(nn.Linear):
    def forward(self, x):
        return super().forward(x).float()


def test_the_coarsest_dtype_counts_also_where_the_output_says_another():
    layer, x = Widened(24, 16), linear_input()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        assert output.dtype is torch.float32
        assert check_forward(layer, x, output) is None
    assert check_forward(layer, x, output) is not None  # not without autocast: that is no rounding of float32


@pytest.mark.parametrize(("precision", "dtype"), [("medium", torch.bfloat16), ("high", torch.float16)])
def test_float32_products_may_be_rounded_where_the_user_allows_it(precision, dtype, monkeypatch):
    """float16 has as many digits as TF32."""
    layer, x = nn.Linear(24, 16, bias=False), linear_input()
    rounded = x.to(dtype).float() @ layer.weight.to(dtype).float().T
    assert check_forward(layer, x, rounded) is not None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    assert check_forward(layer, x, rounded) is None
    assert check_forward(layer, x, rounded * 1.1) is not None


def test_what_hooks_and_patches_do_to_the_output_is_told():
    layer, x = nn.Linear(24, 16), linear_input()
    assert "(a hook changes it)" in check_forward(layer, x, layer(x) * 2)
    layer.forward = lambda inputs: F.linear(inputs, layer.weight, layer.bias).tanh()
    assert "(its forward was replaced)" in check_forward(layer, x, layer(x))
    layer.forward = lambda inputs: F.linear(inputs, layer.weight, layer.bias)
    assert check_forward(layer, x, layer(x)) is None


def test_a_tuple_is_told():
    layer = nn.Linear(24, 16)
    assert check_forward(layer, linear_input(), (layer(linear_input()),)) == "it returns a tuple (a hook changes it)"


def test_rows():
    layer = nn.Linear(24, 16)
    x = linear_input()
    assert rows_agree(layer, x, torch.Size([3, 50, 16]))
    assert rows_agree(layer, x, torch.Size([150, 16]))
    assert not rows_agree(layer, x, torch.Size([3, 49, 16]))
    assert not rows_agree(layer, x, torch.Size([3, 50, 32]))
    assert not rows_agree(layer, x[..., :12], torch.Size([3, 50, 16]))
    conv = nn.Conv2d(3, 5, 3, padding=1)
    assert not rows_agree(conv, image(), torch.Size([2, 5, 12, 11]))
    assert not rows_agree(conv, image(), torch.Size([5, 13, 11]))
    assert not rows_agree(conv, image()[0, 0], torch.Size([5, 13, 11]))


def test_values_that_are_not_finite_are_passed_over():
    layer, x = nn.Linear(24, 16), linear_input()
    x[0, 0], x[1, 0, 3] = math.inf, math.nan
    assert check_forward(layer, x, layer(x)) is None
    activated = Activated(24, 16)
    assert check_forward(activated, x, activated(x)) is not None


def test_zero_tells_nothing_of_an_own_forward():
    x = linear_input()
    for layer in (nn.Linear(24, 16), Activated(24, 16)):
        nn.init.zeros_(layer.weight)
        nn.init.ones_(layer.bias)
        told = check_forward(layer, x, layer(x))
        assert (told is None) == (type(layer) is nn.Linear)
        assert told is None or "its input or its weight is zero" in told


def test_nothing_is_left_behind():
    """No graph, no random number, no change of the weight."""
    layer, x = nn.Linear(24, 16), linear_input()
    before, state = layer.weight.clone(), torch.get_rng_state()
    output = layer(x)
    check_forward(layer, x, output)
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_of_timm():
    """Of a network with padding computed in forward, exactly those convolutions are refused that need it."""
    timm = pytest.importorskip("timm")
    net = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    told, plain = {}, {}

    def hook(module, args, output):
        (told if type(module).__name__ == "Conv2dSame" else plain)[module] = check_forward(module, args[0], output)

    for layer in net.modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1:
            layer.register_forward_hook(hook)
    with torch.no_grad():
        net(torch.randn(1, 3, 64, 64))
    assert plain
    assert all(reason is None for reason in plain.values())
    assert [bool(reason) for reason in told.values()] == [True]


def test_jagged_rows():
    layer = nn.Linear(24, 16)
    x = torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)], layout=torch.jagged)
    assert check_forward(layer, x, layer(x)) is None
    assert check_forward(layer, x, layer(x).tanh()) is not None
