"""Labelled examples of a classifier, ranked."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_curvature.analysis.labels import rank_labelled
from tests.support.axes import axis, diagonal


def test_only_labelled_examples_of_a_classifier_are_ranked():
    model, factors = nn.Linear(20, 3), diagonal(range(20, 0, -1))

    def rank(*tensors):
        return rank_labelled(nn.Sequential(model), DataLoader(TensorDataset(*tensors), 2, shuffle=True), "0", factors)

    rows = rank(torch.cat([axis(0), axis(19), axis(3)]).squeeze(1).float(), torch.tensor([0, 1, 2]))
    assert [row["index"] for row in rows] == [1, 0, 2]
    assert [row["label"] for row in rows] == [1, 0, 2]
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.0]
    x, y = torch.ones(4, 20), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Examples must be \(inputs, label\), found batches of type list"):
        rank(x)
    with pytest.raises(ValueError, match=r"Labels must be class indices \[n\], found torch.float32 \[4, 1\]"):
        rank(x, torch.ones(4, 1))
    with pytest.raises(
        ValueError, match=r"returned \[4, 2, 3\] for inputs \[4, 2, 20\], expected logits \[4, classes\]"
    ):
        rank(torch.ones(4, 2, 20), y)
    with pytest.raises(ValueError, match="A DataLoader of a dataset with numbered examples is needed, found list"):
        rank_labelled(model, [(x, y)], "0", factors)
    with pytest.raises(ValueError, match="found DataLoader of list, which has none"):
        rank_labelled(model, DataLoader([]), "0", factors)
    with pytest.raises(ValueError, match="Labels 0 to 3 are not among the 3 classes of Sequential"):
        rank(x, torch.tensor([0, 3, 1, 1]))
    pairs = DataLoader([*zip(x, y, strict=True)], 3)
    assert len(rank_labelled(nn.Sequential(model), pairs, "0", factors)) == 4
