"""Free memory of a device, and where an edit runs."""

import torch

from lightning_curvature.memory import edit_bytes, free_memory, place_edit, training_seconds


def test_a_layer_is_edited_on_the_gpu_if_there_is_room(monkeypatch):
    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    shape, free = (64, 256), {"cuda": 2 * edit_bytes(64, 256) + 2**28, "cpu": 0}
    monkeypatch.setattr("lightning_curvature.memory.free_memory", lambda device: free[device.type])
    assert place_edit(cuda, cpu, shape) == cuda
    assert place_edit(cpu, cuda, shape) == place_edit(cuda, cuda, shape) == cuda
    assert place_edit(cpu, cpu, shape) == place_edit(torch.device("mps"), cpu, shape) == cpu
    free["cuda"] -= 1
    assert place_edit(cuda, cpu, shape) == cpu
    assert place_edit(cuda, cuda, shape) == cuda


def test_device_memory_is_asked_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7, 9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    assert free_memory(torch.device("cuda")) == 9  # what the allocator holds but does not use is free, too


def test_a_training_is_guessed_to_take_what_its_products_and_its_steps_take():
    assert training_seconds(1e10, 0, on_gpu=False) == 3.0
    assert training_seconds(1e13, 1000, on_gpu=True) == 5.0
