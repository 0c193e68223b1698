import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import ViTForImageClassification

from lightning_curvature.demos.vit import ViT
from lightning_curvature.layers.selection import choose_layers, default_layers
from tests.support import models
from tests.support.blocks import Parts, lin, resolve_all


def ran(module, x=None):
    """Names of leaf layers in the order in which they run."""
    order = []
    names = {layer: name for name, layer in module.named_modules()}
    handles = [layer.register_forward_hook(lambda m, *_: order.append(names[m])) for layer in names]
    module(torch.randn(2, 8, 8) if x is None else x)
    for handle in handles:
        handle.remove()
    return order


def resolve(module, layers, head, x=None):
    choice = choose_layers(module, layers)
    return choice.resolve([name for name in ran(module, x) if name in choice.modules], {head})


def test_presets_of_a_vision_transformer():
    net = models.vit()
    mlp = [f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)]
    attention = [f"blocks.{i}.attention.{leaf}" for i in (0, 1) for leaf in ("qkv", "proj")]
    assert resolve(net, "mlp", "head") == mlp
    assert resolve(net, "last-mlp", "head") == ["blocks.1.fc2"]
    assert resolve(net, "attention", "head") == attention
    assert set(resolve(net, "linear", "head")) == {*mlp, *attention, "embed"}


def test_presets_of_torchvision_and_transformers():
    assert resolve(models.torchvision_vit(), "last-mlp", "1.heads.head") == ["1.encoder.layers.encoder_layer_1.mlp.3"]
    net = ViTForImageClassification(models.hf_vit_config())
    images = torch.randn(2, 1, 8, 8)
    assert resolve(net, "last-mlp", "classifier", images) == ["vit.layers.1.mlp.fc2"]
    assert len(resolve(net, "attention", "classifier", images)) == 8
    assert len(resolve(net, "mlp", "classifier", images)) == 4


def test_presets_of_a_plain_mlp_and_a_cnn():
    assert resolve(models.mlp(), "mlp", "5") == ["1", "3"]
    assert resolve(models.mlp(), "last-mlp", "5") == ["3"]
    assert resolve(models.cnn(), "mlp", "11") == ["8"]
    convolutional = nn.Sequential(
        models.Channels(1), nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 4)
    )
    assert resolve(convolutional, "mlp", "4") == ["1", "2"]  # its only linear layer is the head
    assert resolve(convolutional, "last-mlp", "4") == ["2"]


def test_patterns_take_what_presets_leave_out():
    net = models.mlp()
    assert resolve(net, ["5"], "5") == ["5"]
    assert resolve(net, ["last-mlp", "1"], "5") == ["1", "3"]
    tied = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 4))
    tied[2].weight = tied[1].weight
    assert resolve(tied, "mlp", "4") == ["3"]
    assert resolve(tied, ["mlp", "1"], "4") == ["1", "3"]


def test_a_pattern_that_matches_nothing_lists_near_names():
    with pytest.raises(ValueError, match=r"matches no editable layer. Did you mean 'blocks.0.fc1'"):
        choose_layers(models.vit(), "blocks.0.fc3")
    with pytest.raises(ValueError, match=r"'mpl' is no preset .*Did you mean 'mlp'"):
        choose_layers(models.vit(), "mpl")


def test_a_preset_without_layers_and_bad_types():
    with pytest.raises(ValueError, match="Preset 'attention' matches no layer"):
        choose_layers(models.mlp(), "attention")
    for layers in ([], [1]):
        with pytest.raises(TypeError, match="layers must be a preset"):
            choose_layers(models.mlp(), layers)


def test_layers_that_cannot_be_edited_are_refused_by_name():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Layer '0' \(matched by '0'\) cannot be edited: .*groups=2"):
        choose_layers(net, "0")
    with pytest.raises(ValueError, match="remove_parametrizations"):
        choose_layers(net, "1*")


def test_a_layer_that_never_runs_is_an_error():
    net = models.torchvision_vit()
    choice = choose_layers(net, "attention")
    with pytest.raises(RuntimeError, match=r"out_proj' never ran .*nn.MultiheadAttention reads the weight"):
        choice.resolve([], set())


class Recurrence(Parts):
    """A module that holds one of torch's recurrent layers: its linear layers are not the recurrent ones."""


# Weights that cannot be edited --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_preset_with_a_hole_is_refused_with_the_reason_and_the_remedy():
    net = nn.Sequential(nn.utils.weight_norm(lin()), lin(), lin(8, 3))
    for preset in ("mlp", "last-mlp", "linear"):
        with pytest.raises(
            ValueError, match=rf"Preset '{preset}' would leave out .* '0' .*remove_weight_norm\(module\)"
        ):
            choose_layers(net, preset)
    assert resolve(net, ["1"], "2", torch.randn(2, 8)) == ["1"]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_normalised_head_is_no_hole():
    net = nn.Sequential(lin(), lin(), nn.utils.weight_norm(lin(8, 3)))
    assert resolve_all(net, "mlp", ()) == ["0", "1"]
    with pytest.raises(RuntimeError, match=r"'2' \(its weight is computed .*weight_norm"):
        resolve_all(net, "mlp", ("1",))  # the head is another layer


def test_a_normalised_convolution_is_named_where_convolutions_are_what_is_left():
    net = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)), nn.Conv2d(2, 2, 3), nn.Flatten(), lin(8, 3))
    with pytest.raises(RuntimeError, match=r"Preset 'mlp' would leave out .* '0' .*remove_spectral_norm"):
        resolve_all(net, "mlp", {"3"})
    plain = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(1, 2, 3)), nn.Flatten(), lin(), lin(8, 3))
    assert resolve_all(plain, "mlp", {"3"}) == ["2"]


def test_lazy_layers_are_candidates():
    net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    choice = choose_layers(net, "mlp")
    assert list(choice.modules) == ["0", "2", "4"]
    assert choose_layers(net, "2").named == {"2"}
    net(torch.randn(2, 5))
    assert choice.resolve(["0", "2", "4"], {"4"}) == ["0", "2"]
    assert choice.modules["0"].weight.shape == (8, 5)


def test_the_last_of_layers_none_of_which_ran_is_an_error():
    net = nn.Sequential(lin(), lin(), nn.Conv2d(1, 1, 1), lin(8, 3))
    with pytest.raises(RuntimeError, match="Chosen layers '0', '1' never ran in the first collected batch"):
        choose_layers(net, ["last-mlp", "2"]).resolve(["2", "3"], {"3"})


def test_nothing_but_the_head():
    choice = choose_layers(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), "last-mlp")
    with pytest.raises(RuntimeError, match=r"nothing to edit besides the output head \('1'\)"):
        choice.resolve(["1"], {"1"})


def test_of_a_network_and_its_teacher_one_tells_the_depth():
    class Student(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.student = ViT(image_size=8, patch=4, classes=4, width=16, depth=depth, heads=2, inner=8, mlp_ratio=2)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    assert default_layers(Student(4)) == "last-mlp"
    assert default_layers(Student(7)) == "mlp"
