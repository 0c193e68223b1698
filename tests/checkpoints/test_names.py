"""Names of layers are matched to tensors by rule."""

import pytest

from lightning_curvature.checkpoints import names


def test_names_match_by_rule():
    layers = ["layers.0.fc", "layers.1.fc"]
    for prefix in ("", "model.", "module._orig_mod.", "net.model."):
        keys = [f"{prefix}{layer}.weight" for layer in layers] + ["other.weight"]
        assert list(names.match_layers(layers, keys).values()) == keys[:2]
        prefixed, plain = [key.removesuffix(".weight") for key in keys[:2]], [f"{layer}.weight" for layer in layers]
        assert list(names.match_layers(prefixed, plain).values()) == plain
    both = [f"{who}.{layer}.weight" for who in ("student", "teacher") for layer in layers]
    with pytest.raises(ValueError, match=r"may be any of 'student.layers.0.fc.weight', 'teacher.layers.0.fc.weight'"):
        names.match_layers(layers, both)
    assert list(names.match_layers(layers, [*both, *(f"{layer}.weight" for layer in layers)]).values()) == [
        "layers.0.fc.weight",
        "layers.1.fc.weight",
    ]
    with pytest.raises(ValueError, match=r"1 of 2 layers .*\n  'layers.1.fc'. Did you mean .*'layers.1.fd.weight'"):
        names.match_layers(layers, ["layers.0.fc.weight", "layers.1.fd.weight"])
    with pytest.raises(ValueError, match="2 of 2 layers of the factors have no weight"):
        names.match_layers(layers, ["x.bias"])
    packed = ["layers.0.fc.weight", "layers.1.fc.qweight"]
    with pytest.raises(ValueError, match=r"'layers.1.fc'. Its weight is packed \(quantized\): 'layers.1.fc.qweight'"):
        names.match_layers(layers, packed)


def test_copies_that_are_trained_beside_a_layer_have_its_name():
    assert names.plain("base_model.model.score.modules_to_save.default") == "base_model.model.score"
    matched = names.match_layers(["model.score.modules_to_save.default"], ["score.weight", "head.weight"])
    assert list(matched.values()) == ["score.weight"]


def test_some_names_match():
    tensors = ["base.layers.0.fc.weight", "base.other.weight"]
    assert names.match_some(["layers.0.fc", "layers.1.fc"], tensors) == {"layers.0.fc": tensors[0]}
    assert names.match_some(["layers.1.fc"], tensors) == {}


def test_names_never_lead_to_another_layer():
    """Exact names first, no other block, no tensor twice."""
    exact = ["net.base_layer.fc.weight", "net.fc.weight"]
    assert names.match_layers(["net.base_layer.fc"], exact) == {"net.base_layer.fc": exact[0]}
    assert names.match_layers(["net.base_layer.fc", "net.fc"], exact)["net.fc"] == exact[1]
    for layer, tensor in (("model.layers.15.mlp.down_proj", "down_proj.weight"), ("fc", "layers.3.fc.weight")):
        with pytest.raises(ValueError, match="1 of 1 layers"):
            names.match_layers([layer], [tensor])
    with pytest.raises(ValueError, match=r"may be any of 'm.a._orig_mod.fc.weight', 'm.a.base_layer.fc.weight'"):
        names.match_layers(["a.fc"], ["m.a._orig_mod.fc.weight", "m.a.base_layer.fc.weight"])
    with pytest.raises(ValueError, match="would be one tensor"):
        names.match_layers(["a._orig_mod.fc", "a.fc"], ["m.a.fc.weight"])
