"""Networks of mixers alone: no preset for MLPs or attention applies."""

import pytest

from lightning_curvature.layers.selection import choose_layers
from tests.support.architectures import Case, order_of, resolve
from tests.support.hf_builders import old, text

MIXERS = {
    "Mamba": (
        lambda: old("Mamba", hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=3),
        text,
        r"'backbone.layers.0.mixer' \(MambaMixer\)",
        "*.mixer.out_proj",
        "#.mixer.(in_proj|x_proj|out_proj)",
    ),
    "Mamba 2": (
        lambda: old(
            "Mamba2", hidden_size=8, state_size=4, num_hidden_layers=2, num_heads=2, head_dim=8, expand=2, n_groups=1
        ),
        text,
        r"'backbone.layers.0.mixer' \(Mamba2Mixer\)",
        "*.mixer.out_proj",
        "#.mixer.(in_proj|out_proj)",
    ),
}


@pytest.mark.parametrize("architecture", MIXERS)
@pytest.mark.parametrize("preset", ["mlp", "last-mlp", "attention"])
def test_a_network_of_mixers_alone_is_refused_by_name(architecture, preset):
    make, _, words, pattern, _ = MIXERS[architecture]
    with pytest.raises(ValueError, match=rf"Preset '{preset}' does not apply .* mixers, .*: {words}") as error:
        choose_layers(make(), preset)
    assert f"layers=['{pattern}']" in str(error.value)


@pytest.mark.parametrize("architecture", MIXERS)
def test_layers_of_mixers_that_are_called(architecture):
    """Some weights are read by a kernel, or by a product in the mixer's own code: "linear" leaves those layers out."""
    make, inputs, _, pattern, called = MIXERS[architecture]
    net = make()
    order, head = order_of(net, inputs()), "lm_head"
    names = Case(None, None, "", "backbone.layers.", called).names("mlp")
    assert set(resolve(net, "linear", order, head)) == names
    assert set(resolve(net, pattern, order, head)) == {name for name in names if name.endswith("out_proj")}
    if architecture == "Mamba":
        assert "backbone.layers.0.mixer.dt_proj" in choose_layers(net, "linear").modules
        with pytest.raises(RuntimeError, match=r"mixer.dt_proj' never ran"):
            resolve(net, ["*.in_proj", "*.0.mixer.dt_proj"], order, head)
