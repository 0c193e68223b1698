"""Factors by layer: a mapping, and sums of it."""

import pytest
import torch

from lightning_curvature import KroneckerFactors, LayerFactors
from tests.support.factors import layer


def test_mapping():
    factors = KroneckerFactors({"fc1": layer()})
    assert len(factors) == 1
    assert "fc1" in factors
    assert "fc2" not in factors
    assert repr(factors) == "KroneckerFactors({'fc1': [2, 3]})"
    with pytest.raises(KeyError, match=r"No factors of layer 'fc2'\. Did you mean 'fc1'"):
        factors["fc2"]
    assert not KroneckerFactors()


def test_merge_is_weighted_by_counts():
    torch.manual_seed(0)
    a, g = torch.randn(30, 3), torch.randn(30, 2)

    def of(rows):
        n = len(a[rows])
        return KroneckerFactors(
            {"fc": LayerFactors(A=a[rows].T @ a[rows] / n, G=g[rows].T @ g[rows] / n, num_inputs=n, num_gradients=n)}
        )

    merged, whole = of(slice(0, 7)).merge(of(slice(7, None))), of(slice(None))
    assert (merged["fc"].num_inputs, merged["fc"].num_seen) == (30, 30)
    torch.testing.assert_close(merged["fc"].A, whole["fc"].A)
    torch.testing.assert_close(merged["fc"].G, whole["fc"].G)
    with pytest.raises(ValueError, match="other layers"):
        merged.merge(KroneckerFactors())
    with pytest.raises(ValueError, match="Layer 'fc': cannot merge"):
        merged.merge(KroneckerFactors({"fc": layer(d_in=4)}))


def test_bad_layers():
    eye = torch.eye(2)
    for bad in (torch.ones(2, 3), torch.ones(2), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="Factor A must be a square floating matrix"):
            LayerFactors(A=bad, G=eye, num_inputs=1, num_gradients=1)
    with pytest.raises(ValueError, match="Counts must not be negative"):
        LayerFactors(A=eye, G=eye, num_inputs=-1, num_gradients=1)
    with pytest.raises(TypeError, match="Layer 'fc': expected LayerFactors, found tuple"):
        KroneckerFactors({"fc": (eye, eye)})
