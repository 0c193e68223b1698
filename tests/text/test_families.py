"""Factors and edits of causal language models, family by family."""

import pytest
import torch
import torch.nn.functional as F

from lightning_curvature import CurvatureEditor
from lightning_curvature.collect.passes import collect
from tests import reference
from tests.support import language, models

EVERY = pytest.mark.parametrize("family", language.FAMILIES)


def step_of(net):
    return lambda batch: net(**(batch if isinstance(batch, dict) else {"input_ids": batch, "labels": batch})).loss


def shifted(labels):
    """Vectors to backpropagate from the logits for the data's own labels; nothing at the last position."""

    def vectors(logits, index):
        p = logits.detach().softmax(-1)
        v = torch.zeros_like(p)
        v[:, :-1] = p[:, :-1] - F.one_hot(labels[index, 1:], p.shape[-1])
        yield v

    return vectors


def exact_but_the_last(logits, index):
    return (v for v in reference.exact_vectors(logits, index) if not bool(v[:, -1].any()))


class Logits(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids):
        return self.net(input_ids=ids).logits


@EVERY
def test_presets(family):
    net, rows = language.model(family), language.tokens(4, 8)
    expected = language.FAMILIES[family][2]
    assert set(collect(net, [rows], step_of(net), layers="mlp")) == set(expected)
    assert list(collect(net, [rows], step_of(net))) == expected[-1:]
    attention = set(collect(net, [rows], step_of(net), layers="attention"))
    assert attention
    assert not attention & set(expected)
    assert all("att" in name for name in attention)


@EVERY
@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_factors_against_the_reference(family, kind):
    net, rows = language.model(family).double(), language.tokens(3, 5)
    factors = collect(net, [rows], step_of(net), layers="mlp", fisher=kind)
    for name in (language.FAMILIES[family][2][0], language.FAMILIES[family][2][-1]):
        vectors = shifted(rows) if kind == "empirical" else exact_but_the_last
        A, G, count = reference.factors(Logits(net), net.get_submodule(name), rows, vectors, "contributing")
        layer = factors[name]
        assert layer.num_inputs == layer.num_gradients == count == 12
        assert layer.num_seen == 15
        torch.testing.assert_close(layer.A, A)
        # transformers computes its loss in float32, whatever the dtype of the model
        torch.testing.assert_close(layer.G, G, rtol=1e-4, atol=1e-6 * float(G.abs().max()))


@EVERY
def test_an_edit_changes_exactly_the_chosen_weights(family):
    net, rows = language.model(family), language.tokens(8, 16)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    factors = collect(net, [rows], step_of(net), layers="mlp")
    report = CurvatureEditor(0.8).edit(net, factors)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{name}.weight" for name in language.FAMILIES[family][2]}
    assert set(report.layers) == set(language.FAMILIES[family][2])
    with torch.no_grad():
        assert bool(torch.isfinite(net(input_ids=rows).logits).all())


@pytest.mark.parametrize("family", language.EXPERTS)
def test_fused_experts_are_an_error_that_names_them(family):
    net, rows = language.model(family), language.tokens(2, 8)
    for preset in ("last-mlp", "mlp", "linear"):
        with pytest.raises(ValueError, match=r"leave out the experts .*'model.layers.0.mlp.experts'.*fused 3-D"):
            collect(net, [rows], step_of(net), layers=preset)
    with pytest.raises(ValueError, match=r"experts' .* cannot be edited: it keeps its experts in fused .*gate_up_proj"):
        collect(net, [rows], step_of(net), layers="model.layers.*.mlp.experts")
    assert len(collect(net, [rows], step_of(net), layers="attention")) == 8


# Padding, prompts, packing, checkpointing ---------------------------------------------------------------------------


def padded(rows, side, length=12):
    ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[i, where], mask[i, where] = row, 1
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if side == "left":  # the position before a sentence would predict its first word
        labels[torch.arange(len(rows)), mask.argmax(1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


def packed(rows):
    """All sentences in one row: positions start anew, no attention across, no label across."""
    ids = torch.cat(list(rows))[None]
    owner = torch.cat([torch.full((len(row),), i) for i, row in enumerate(rows)])
    allowed = (owner[:, None] == owner) & torch.ones(len(owner), len(owner)).tril().bool()
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
    labels = ids.clone()
    starts = [0, *torch.tensor([len(row) for row in rows]).cumsum(0)[:-1].tolist()]
    labels[0, starts] = -100
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "labels": labels}


@pytest.mark.parametrize("family", ["olmo2", "llama", "gpt2", "neox", "qwen3"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_padding_and_packing_change_nothing(family, layout):
    net = language.model(family)
    rows = [language.tokens(1, length, seed=length)[0] for length in (12, 7, 4, 9)]
    alone = collect(net, [row[None] for row in rows], step_of(net), layers="mlp", fisher="empirical")
    batch = packed(rows) if layout == "packed" else padded(rows, layout)
    factors = collect(net, [batch], step_of(net), layers="mlp", fisher="empirical")
    for name, layer in alone.items():
        assert factors[name].num_inputs == layer.num_inputs == sum(len(row) - 1 for row in rows)
        torch.testing.assert_close(factors[name].A, layer.A, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(factors[name].G, layer.G, rtol=1e-5, atol=1e-5)


def test_ignored_prompts_do_not_count():
    """Only the answer has loss positions; the prompt counts where later losses reach it, in all but the last block."""
    net, rows = language.model(), language.tokens(4, 12)
    labels = rows.clone()
    labels[:, :6] = -100
    factors = collect(net, [{"input_ids": rows, "labels": labels}], step_of(net), layers="mlp")
    assert factors["model.layers.1.mlp.down_proj"].num_inputs == 4 * 6
    assert factors["model.layers.0.mlp.down_proj"].num_inputs == 4 * 11


@pytest.mark.parametrize("kind", ["sketched", "empirical"])
def test_gradient_checkpointing_counts_once(kind):
    net, rows = language.model(), language.tokens(4, 12)
    plain = collect(net, [rows], step_of(net), layers="mlp", fisher=kind)
    enable = getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)  # renamed in 5.2x
    enable({"use_reentrant": False})
    net.train()
    factors = collect(net, [rows], step_of(net), layers="mlp", fisher=kind)
    for name, layer in plain.items():
        assert factors[name].num_inputs == layer.num_inputs == 44
        torch.testing.assert_close(factors[name].A, layer.A)
        torch.testing.assert_close(factors[name].G, layer.G)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_are_left_alone(family):
    net, rows = language.model(family), language.tokens(4, 12)
    head = net.get_output_embeddings().weight
    assert head is net.get_input_embeddings().weight
    assert "lm_head" not in collect(net, [rows], step_of(net), layers="linear")


def test_exact_is_the_mean_of_many_draws():
    """Within four standard errors, entry by entry in the norm, on a tiny vocabulary."""
    net, rows = language.model().double(), language.tokens(2, 6)
    name = "model.layers.1.mlp.down_proj"
    exact = collect(net, [rows], step_of(net), layers=name, fisher="exact")[name].G
    for kind in ("sketched", "sampled"):
        draws = torch.stack(
            [collect(net, [rows], step_of(net), layers=name, fisher=kind, seed=seed)[name].G for seed in range(200)]
        )
        error = draws.mean(0) - exact
        standard_error = draws.std(0) / len(draws) ** 0.5
        assert float(error.norm()) < 2 * float(standard_error.norm()), kind
        assert float((error.abs() / standard_error).median()) < 1.5, kind


@EVERY
def test_a_causal_language_model_in_a_trainer(family, tmp_path):
    from lightning_curvature import KFACEditCallback

    module, callback = language.LitLM(family), KFACEditCallback()
    trainer = models.trainer(tmp_path, callback, max_epochs=1)
    trainer.fit(module, language.loader(language.tokens(24, 12)))
    assert list(callback.factors) == [f"net.{language.FAMILIES[family][2][-1]}"]
    path = trainer.checkpoint_callback.best_model_path.replace(".ckpt", "-edited.ckpt")
    edited = language.LitLM.load_from_checkpoint(path, weights_only=True)
    changed = [key for key, value in edited.state_dict().items() if not torch.equal(value, module.state_dict()[key])]
    assert changed == [f"net.{language.FAMILIES[family][2][-1]}.weight"]
