"""The bulk step: made in the flat block alone, by the gradient of margins."""

import pytest
import torch
from torch import nn

from lightning_curvature import KroneckerFactors, LayerFactors
from lightning_curvature.checkpoints.deltas import apply_delta
from lightning_curvature.editing.bulk import BulkStepEditor, add_margins
from lightning_curvature.report.inspection import describe


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4, bias=False)).double()


def diagonal_factors(d_out=4, d_in=6):
    """Curvature along the axes, falling."""
    A, G = (torch.diag(torch.arange(d, 0, -1.0)).double() for d in (d_in, d_out))
    return KroneckerFactors({"0": LayerFactors(A=A, G=G, num_inputs=9, num_gradients=9)})


def margins_of(module, labels):
    def margins(inputs):
        logits = module(inputs)
        of_label = logits.gather(1, labels[:, None])
        return of_label - logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)

    return margins


def test_margins_are_the_gradient_and_leave_no_trace():
    module, inputs, labels = linear(), torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 3, 0])
    module[0].weight.requires_grad_(False)
    margins = add_margins(module, diagonal_factors(), [inputs], margins_of(module, labels))["0"].margins
    assert module[0].weight.grad is None
    assert not module[0].weight.requires_grad
    rival = module(inputs).scatter(1, labels[:, None], -torch.inf).argmax(1)
    expected = torch.zeros(4, 6).double()
    for x, label, rival_label in zip(inputs, labels, rival, strict=True):
        expected[label] += x
        expected[rival_label] -= x
    torch.testing.assert_close(margins, expected)
    with pytest.raises(ValueError, match="nothing to forget"):
        add_margins(module, diagonal_factors(), [], margins_of(module, labels))


def test_the_step_is_made_in_the_flat_block_alone_and_has_its_length():
    module, inputs, labels = linear(), torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 3, 0])
    factors = add_margins(module, diagonal_factors(), [inputs], margins_of(module, labels))
    before = module[0].weight.detach().clone()
    with BulkStepEditor(0.3, bulk=0.5).applied(module, factors) as report:
        change = module[0].weight.detach() - before
    assert torch.equal(module[0].weight, before)
    block = -factors["0"].margins[2:, 3:]
    torch.testing.assert_close(change[2:, 3:], block / block.norm() * 0.3 * before.norm())
    assert not change[:2].any()
    assert not change[:, :3].any()
    assert report.layers["0"].relative_change == pytest.approx(0.3)
    with BulkStepEditor(0.3, energy=0.5, bulk=0.5).applied(module, factors) as report:
        assert report.layers["0"].energy_kept >= 0.5
        assert report.layers["0"].kept < 24


def test_bulk_errors():
    module = linear()
    with pytest.raises(ValueError, match="Layer '0': a bulk step needs the gradient of margins"):
        BulkStepEditor().edit(module, diagonal_factors())
    with pytest.raises(ValueError, match="strength must not be negative"):
        BulkStepEditor(-1.0)
    with pytest.raises(TypeError, match="strength must be a number"):
        BulkStepEditor("much")
    with pytest.raises(ValueError, match="bulk must be in"):
        BulkStepEditor(bulk=0)
    layer = diagonal_factors()["0"]
    steep = LayerFactors(A=layer.A, G=layer.G, num_inputs=9, num_gradients=9, margins=torch.zeros(4, 6).double())
    with pytest.raises(ValueError, match="no part in the flat directions"):
        BulkStepEditor().edit(module, KroneckerFactors({"0": steep}))


def test_a_bulk_step_of_a_file_can_be_taken_back(tmp_path):
    module, inputs, labels = linear(), torch.randn(5, 6).double(), torch.tensor([0, 1, 2, 3, 0])
    factors = add_margins(module, diagonal_factors(), [inputs], margins_of(module, labels))
    factors.save(tmp_path / "f.safetensors")
    factors = KroneckerFactors.load(tmp_path / "f.safetensors")
    torch.save(module.state_dict(), tmp_path / "a.pt")
    editor = BulkStepEditor(0.3)
    editor.edit_checkpoint(tmp_path / "a.pt", factors, tmp_path / "b.pt", delta=tmp_path / "d.safetensors")
    apply_delta(tmp_path / "b.pt", tmp_path / "d.safetensors", tmp_path / "c.pt", revert=True)
    assert torch.equal(torch.load(tmp_path / "c.pt")["0.weight"], module[0].weight)
    assert describe(tmp_path / "b.pt")["edit"]["strength"] == 0.3
    editor.edit(module, factors)
    assert torch.equal(torch.load(tmp_path / "b.pt")["0.weight"], module[0].weight)
