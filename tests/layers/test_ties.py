"""Which tensors share memory."""

import pytest
import torch

from lightning_curvature.layers.ties import find_tie

NO_MEMORY = {
    "meta": lambda: torch.empty(6, 6, device="meta"),
    "empty": lambda: torch.empty(0, 6),
    "sparse": lambda: torch.eye(6).to_sparse(),
    "no tensor": lambda: None,
}


@pytest.mark.parametrize("kind", NO_MEMORY)
def test_what_has_no_memory_of_its_own_shares_nothing_but_with_itself(kind):
    tensor, separate = NO_MEMORY[kind](), NO_MEMORY[kind]()
    if tensor is not None:
        assert find_tie({"one": tensor, "two": separate, "three": torch.ones(6, 6)}) is None
    assert find_tie({"one": tensor, "two": torch.ones(6, 6), "three": tensor}) == ("one", "three")
