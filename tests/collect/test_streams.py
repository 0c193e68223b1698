"""Side streams: the order of what CUDA is told."""

from types import SimpleNamespace

import torch

from lightning_curvature.collect.streams import SideStreams


def test_work_runs_beside_the_main_stream(monkeypatch):
    """The order of what CUDA is told; there is none here."""
    told = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, awaited):
            told.append(f"{self.name} waits for {getattr(awaited, 'name', awaited)}")

    class Entered:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            told.append(f"enter {self.stream.name}")

        def __exit__(self, *error):
            told.append(f"leave {self.stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"side {device}"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"main {device}"))
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    tensor = SimpleNamespace(
        device=torch.device("cuda:0"), record_stream=lambda stream: told.append(f"kept for {stream.name}")
    )
    streams = SideStreams()
    streams.wait()
    with streams.beside([tensor, torch.ones(1)]):
        told.append("work")
    streams.wait()
    assert told == [
        "side cuda:0 waits for main cuda:0",
        "enter side cuda:0",
        "work",
        "kept for side cuda:0",
        "leave side cuda:0",
        "main cuda:0 waits for side cuda:0",
    ]
    told.clear()
    with streams.beside([torch.ones(1)], [torch.device("cpu")]):
        pass
    assert told == []
    part = SimpleNamespace(device=torch.device("cuda:0"), _local_tensor=tensor)  # of a tensor spread over processes
    with streams.beside([part], [torch.device("cuda:1")]):
        assert {"enter side cuda:0", "enter side cuda:1"} <= set(told)
    assert told.count("kept for side cuda:0") == 1
