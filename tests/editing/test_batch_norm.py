"""Running statistics of batch norms are estimated anew for edited weights."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_curvature import CurvatureEditor
from lightning_curvature.collect.passes import collect
from lightning_curvature.distributed import Ranks
from lightning_curvature.editing.batch_norm import Recalibration, batch_norms, estimate
from tests.support import processes
from tests.support.processes import here


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).eval()


def data(n=40, seed=1):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) * 3 + 1


def recalibration(module, *batches):
    return Recalibration(lambda: [module(batch) for batch in batches], set(batch_norms(module)))


def statistics(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def test_of_one_batch_they_are_those_of_torch():
    module, x = net(), data()
    expected = copy.deepcopy(module)
    update_bn([x], expected)
    found = estimate(module, recalibration(module, x), Ranks())
    assert set(found) == {f"{norm}.running_{kind}" for norm in (1, 4, 7) for kind in ("mean", "var")}
    for name, value in found.items():
        torch.testing.assert_close(value, dict(expected.named_buffers())[name])


def test_of_several_batches_they_are_those_of_all_positions():
    module, batches = net(), [data(8, 1), 5 * data(24, 2)]
    found = estimate(module, recalibration(module, *batches), Ranks())
    rows = module[0](torch.cat(batches)).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(found["1.running_mean"], rows.mean(0))
    torch.testing.assert_close(found["1.running_var"], rows.var(0))


def test_the_module_is_what_it_was():
    module = net()
    before, x = statistics(module), data()
    estimate(module, recalibration(module, x), Ranks())
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    assert not any(part.training for part in module.modules())
    assert not any(part._forward_pre_hooks for part in module.modules())
    with pytest.raises(RuntimeError, match="no data"):
        estimate(module, Recalibration(fails, set(batch_norms(module))), Ranks())
    assert not any(part._forward_pre_hooks for part in module.modules())


def fails():
    raise RuntimeError("no data")


def test_others_keep_theirs():
    """Those that are not asked for, those without statistics, and those that do not run."""
    module = net()
    module[4].track_running_stats = False
    module.append(nn.Identity())
    module[9].unused = nn.BatchNorm1d(3)
    names = set(batch_norms(module))
    assert names == {"1", "7", "9.unused"}
    x = data()
    found = estimate(module, Recalibration(lambda: module(x), names - {"7"}), Ranks())
    assert set(found) == {"1.running_mean", "1.running_var"}


def edited(module, x, **options):
    factors = collect(
        module,
        [x],
        lambda batch: nn.functional.cross_entropy(module(batch), batch[:, 0, 0, 0].long() % 3),
        layers=["3"],
    )
    return CurvatureEditor(0.5, min_positions=0, **options), factors


def test_an_edit_of_a_module_renews_them():
    module, x = net(), data()
    editor, factors = edited(module, x)
    before, plain = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    editor.edit(plain, factors)
    expected = estimate(plain, recalibration(plain, x), Ranks())
    editor = editor.recalibrating(recalibration(module, x))
    with editor.applied(module, factors) as report:
        within = statistics(module)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    editor.edit(module, factors)
    for name, value in expected.items():
        torch.testing.assert_close(within[name], value)
        torch.testing.assert_close(module.state_dict()[name], value)
    assert not torch.equal(before["4.running_var"], module.state_dict()["4.running_var"])
    assert "Statistics of 3 batch norms were estimated anew, on training data." in str(report)
    assert "keep statistics" not in str(report)
    assert editor.facts(factors, "x", report)["batch_norms"] == 3


def test_a_report_tells_of_statistics_that_stay():
    module, x = net(), data()
    editor, factors = edited(module, x)
    remark = "3 batch norms keep statistics of the unedited weights, which may harm the model. Estimate them anew on"
    assert remark in str(editor.edit_state_dict(module.state_dict(), factors)[1])
    assert remark in str(editor.edit(module, factors))
    assert "batch_norms" not in editor.facts(factors, "x", editor.edit(module, factors))


def test_a_file_tells_of_statistics_that_stay(tmp_path):
    module, x = net(), data()
    editor, factors = edited(module, x)
    torch.save(module.state_dict(), tmp_path / "model.pt")
    report = editor.edit_checkpoint(tmp_path / "model.pt", factors, tmp_path / "edited.pt", force=True)
    assert (report.norms, report.renewed) == (3, 0)


def of_a_part(rank=None):
    ranks, module = here(), net()
    parts = [data(8, 1), 5 * data(24, 2)]
    return estimate(module, recalibration(module, parts[ranks.rank]), ranks)


def test_processes_add_up_what_each_has_seen():
    module = net()
    alone = estimate(module, recalibration(module, data(8, 1), 5 * data(24, 2)), Ranks())
    for found in processes.run(2, of_a_part):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value)


class ByKeyword(nn.Module):
    """Calls its batch norm by keyword, at times with nothing."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(input=x) if len(x) else x


def test_empty_inputs_keywords_and_infinite_values():
    module, x = ByKeyword().eval(), torch.randn(20, 3)
    found = estimate(module, Recalibration(lambda: [module(x), module(x[:0])], {"norm"}), Ranks())
    torch.testing.assert_close(found["norm.running_mean"], x.mean(0))
    x[0, 0] = torch.inf
    assert not estimate(module, Recalibration(lambda: module(x), {"norm"}), Ranks())


def test_an_edit_that_changes_nothing_renews_nothing():
    module, x = net(), data()
    editor, factors = edited(module, x)
    before = copy.deepcopy(module.state_dict())
    report = editor.at(1.0).recalibrating(recalibration(module, x)).edit(module, factors)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert report.renewed == 0
    assert "batch norms" not in str(report)


def test_an_edit_whose_data_fail_leaves_the_module_as_it_was():
    module, x = net(), data()
    editor, factors = edited(module, x)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError, match="no data"):
        editor.recalibrating(Recalibration(fails, set(batch_norms(module)))).edit(module, factors)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
