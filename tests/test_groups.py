"""Names of many layers on few lines."""

import dataclasses

import torch

from lightning_curvature import EditReport
from lightning_curvature._groups import grouped
from lightning_curvature.collect.plan import MemoryPlan
from lightning_curvature.editing import LayerEdit

NAMES = [f"model.layers.{i}.mlp.{part}_proj" for i in range(30) for part in ("gate", "up", "down")]


def test_names_that_differ_in_numbers_go_together():
    lines = grouped(dict.fromkeys([*NAMES, "lm_head"]))
    assert list(lines) == [*(f"model.layers.{{0..29}}.mlp.{part}_proj" for part in ("gate", "up", "down")), "lm_head"]
    assert sorted(name for names in lines.values() for name in names) == sorted([*NAMES, "lm_head"])
    assert list(grouped(dict.fromkeys(NAMES[:12]))) == NAMES[:12]


def test_gaps_several_numbers_and_digits_within_words():
    blocks = [f"net.{stage}.{block}.conv1" for stage in (0, 1) for block in (0, 1, 2, 4, 7, 8)]
    assert list(grouped(dict.fromkeys([*blocks, "net.0.3.conv2"]))) == [
        "net.{0..1}.{0..2,4,7,8}.conv1",
        "net.0.3.conv2",
    ]
    shapes = {name: (1 if name.startswith("net.0") else 2) for name in blocks} | {"more": 3}
    assert list(grouped(shapes)) == ["net.0.{0..2,4,7,8}.conv1", "net.1.{0..2,4,7,8}.conv1", "more"]


def test_the_plan_of_many_layers():
    plan = MemoryPlan({name: (1536, 576) if "down" not in name else (576, 1536) for name in NAMES}, torch.device("cpu"))
    lines = str(plan).splitlines()
    assert lines[0].startswith("Memory of the K-FAC factors of 90 layers")
    assert [line.split()[:6] for line in lines[1:4]] == [
        ["model.layers.{0..29}.mlp.gate_proj", "30", "x", "1536", "x", "576"],
        ["model.layers.{0..29}.mlp.up_proj", "30", "x", "1536", "x", "576"],
        ["model.layers.{0..29}.mlp.down_proj", "30", "x", "576", "x", "1536"],
    ]
    assert len(lines) == 6
    single = MemoryPlan({NAMES[0]: (1536, 576)}, torch.device("cpu"))
    assert plan.num_bytes == 90 * single.num_bytes


def test_the_report_of_many_layers():
    edit = LayerEdit(0.9, 0.91, 5, 20, 0.5, 10, "w", 100, 0.0, num_gradients=100, needed=200, predicted_loss=0.001)
    edits = {
        name: dataclasses.replace(edit, energy_kept=0.9 + number / 1000, predicted_loss=0.001 + number / 1e5)
        for number, name in enumerate(NAMES)
    }
    lines = str(EditReport(edits)).splitlines()
    assert len(lines) < 12
    (row,) = [line for line in lines if "down_proj" in line and "{0..29}" in line]
    assert row.split()[1:10] == ["0.9", "0.9020", "to", "0.9890", "150", "600", "25.0%", "50.0%", "0.500"]
    assert "0.044" in row.split()  # costs are added up
    text = str(EditReport(edits))
    assert f"Most of it in layer '{NAMES[-1]}'" in text
    assert f"Then in '{NAMES[-2]}' (0.0019), " in text
    assert "and 85 more. Their spectrum" in text
