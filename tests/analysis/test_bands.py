"""Strengths of a layer's outputs by bands of the spectrum."""

import pytest
import torch

from lightning_curvature.analysis import band_strengths, compare_bands
from lightning_curvature.analysis.bands import all_rising
from tests.support.axes import axis, diagonal, mixture


def test_strength_of_each_band():
    factors = diagonal(range(20, 0, -1))
    weight = torch.arange(1.0, 21.0)[None]
    inputs = torch.cat([axis(0, 1, 2, 4, 9, 10), axis(19, times=3.0)])
    expected = torch.tensor(
        [[1, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 5, 0, 0], [0, 0, 10, 0], [0, 0, 0, 11], [0, 0, 0, 60]]
    ).double()
    torch.testing.assert_close(band_strengths(weight, factors, inputs), expected)
    expected[-1] /= 3
    torch.testing.assert_close(band_strengths(weight, factors, inputs, normalize=True), expected)


def test_bands_are_ordered_by_the_product_of_both_spectra():
    factors = diagonal([8.0, 1.0], [4.0, 1.0, 1.0, 0.4, 0.1])
    # Ten pairs: 32, 8, 8, 4, 3.2, 1, 1, 0.8, 0.4, 0.1. The top band holds (0, 0), the second the next one or two.
    weight = torch.zeros(5, 2)
    weight[0, 0], weight[3, 0] = 2.0, 7.0
    strengths = band_strengths(weight, factors, axis(0, dim=2))
    torch.testing.assert_close(strengths, torch.tensor([[2.0, 0.0, 7.0, 0.0]]).double())


def test_bands_of_singular_values():
    weight = torch.diag(torch.arange(20.0, 0.0, -1.0))
    strengths = band_strengths(weight, diagonal([1.0] * 20, [1.0] * 20), axis(0, 3, 8, 15), basis="svd")
    torch.testing.assert_close(strengths, torch.diag(torch.tensor([20.0, 17.0, 12.0, 5.0])).double())


def test_strengths_are_averaged_over_positions():
    factors = diagonal(range(20, 0, -1))
    inputs = torch.cat([axis(0), axis(1)], 1)
    assert band_strengths(torch.ones(1, 20), factors, inputs)[0, 0] == 1.0
    assert band_strengths(torch.ones(1, 20), factors, torch.cat([axis(0), axis(19)], 1))[0].tolist() == [0.5, 0, 0, 0.5]


def test_memorized_over_clean():
    factors, weight = diagonal(range(20, 0, -1)), torch.ones(1, 20)
    memorized, clean = mixture([1, 2, 3, 4]), mixture([4, 4, 2, 1], seed=1)
    comparison = compare_bands("fc", weight, factors, memorized, clean)
    scale = (
        band_strengths(weight, factors, memorized)[:, 0].mean() / band_strengths(weight, factors, clean)[:, 3].mean()
    )
    torch.testing.assert_close(
        torch.tensor(comparison.ratio).double(), scale * torch.tensor([0.25, 0.5, 1.5, 4]).double()
    )
    assert all(
        low < ratio < high for low, ratio, high in zip(comparison.low, comparison.ratio, comparison.high, strict=True)
    )
    assert all(
        high - low < 0.1 * ratio
        for low, ratio, high in zip(comparison.low, comparison.ratio, comparison.high, strict=True)
    )
    assert comparison.rising
    assert comparison == compare_bands("fc", weight, factors, memorized, clean)
    backwards = compare_bands("fc", weight, factors, clean, memorized)
    assert not backwards.rising
    assert all_rising([comparison])
    assert not all_rising([comparison, backwards])
    larger = compare_bands("fc", weight, factors, 9 * memorized, clean, normalize=True)
    smaller = compare_bands("fc", weight, factors, memorized, clean, normalize=True)
    torch.testing.assert_close(torch.tensor(larger.ratio), torch.tensor(smaller.ratio))  # norms do not explain it


def test_bands_of_other_shapes():
    factors = diagonal(range(20, 0, -1))
    with pytest.raises(ValueError, match=r"factors are for a weight \[1, 20\], found \[2, 20\]"):
        band_strengths(torch.ones(2, 20), factors, axis(0))
    with pytest.raises(ValueError, match=r"expected activations \[examples, positions, 20\].* found \[1, 20\]"):
        band_strengths(torch.ones(1, 20), factors, axis(0)[:, 0])
    with pytest.raises(ValueError, match=r"basis.*'curvature'.*'svd'"):
        band_strengths(torch.ones(1, 20), factors, axis(0), basis="fourier")
