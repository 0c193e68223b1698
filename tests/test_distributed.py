"""A failure on one process is raised on all."""

import pytest
import torch

from tests.support import processes
from tests.support.processes import here

pytestmark = pytest.mark.filterwarnings("ignore:The factors of layer .* rest on")


def failing_talk():
    ranks = here()
    messages = []

    def broken():
        raise OSError("the disk is full")

    for call in (
        lambda: ranks.first(broken),
        lambda: ranks.on(1, broken),
        lambda: ranks.spread(["a"], {"a": broken} if ranks.rank == 1 else {}, {"a": 1}),
        lambda: ranks.send(None, 0),
    ):
        with pytest.raises((OSError, RuntimeError)) as error:
            call()
        messages.append(str(error.value))
    results = ranks.spread(
        ["a", "b"],
        {"ab"[ranks.rank]: lambda: int("x")} if ranks.rank else {"a": lambda: (torch.ones(2), "told")},
        {"a": 0, "b": 1},
    )
    return (
        messages,
        results["a"][0].tolist(),
        results["a"][1],
        type(results["b"]).__name__,
        ranks.part(7),
        ranks.is_counted,
    )


def test_a_failure_on_one_process_is_raised_on_all():
    first, second = processes.run(2, failing_talk)
    assert first[:4] == second[:4]
    assert first[0] == ["the disk is full"] * 3 + ["Process 0 has no tensor to send."]
    assert first[1:4] == ([1.0, 1.0], "told", "ValueError")
    assert (first[4], second[4]) == (4, 3)
    assert first[5]
    assert second[5]
