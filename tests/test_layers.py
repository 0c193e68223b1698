import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lightning_curvature.layers import (
    as_matrix,
    conv_patches,
    from_matrix,
    gradient_rows,
    input_rows,
    is_conv1d,
    is_editable,
    refusal,
)

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
    assert "parametrization" in refusal(parametrizations.weight_norm(nn.Linear(2, 2)))
    packed = nn.Linear(2, 2)
    packed.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    assert "packed or quantized (torch.uint8)" in refusal(packed)
