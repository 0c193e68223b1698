"""Edits of groups of layers, together and alone."""

import pytest
import torch

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis import interplay
from tests.support.axes import diagonal
from tests.support.pair import Pair


@pytest.mark.parametrize(("parallel", "excess"), [(True, 0.0), (False, 1.0)])
def test_edits_together_and_alone(parallel, excess):
    """An edit drops the second axis. In parallel each takes its own half; in a row the first takes it all."""
    model = Pair(parallel)
    factors = KroneckerFactors({name: diagonal([9.0, 1.0], [1.0, 1.0]) for name in ("one", "two")})
    x = torch.tensor([[1.0, 1.0]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    effects = interplay(
        model,
        factors,
        CurvatureEditor(0.9),
        {"a": ["one"], "b": ["two"]},
        lambda: {"sum": float(model(x).sum().detach())},
    )
    total = 4.0 if parallel else 2.0
    assert effects.before == {"sum": total}
    assert effects.alone == {"a": {"sum": total - 1}, "b": {"sum": total - 1}}
    assert effects.excess("sum") == excess
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "groups",
    [{"a": ["one"], "b": ["two"]}, {"a": ["one"], "b": ["one"]}, {"a": ["one"], "b": []}],
    ids=["no factors", "twice", "empty"],
)
def test_groups_need_layers_of_their_own(groups):
    model, factors = Pair(True), KroneckerFactors({"one": diagonal([9.0, 1.0], [1.0, 1.0])})
    with pytest.raises(ValueError, match="Each group needs layers of its own, with factors"):
        interplay(model, factors, CurvatureEditor(), groups, dict)
