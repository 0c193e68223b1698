import pytest
import torch

from lightning_curvature import LayerFactors
from lightning_curvature.factors.basis import select_staircase
from lightning_curvature.report import edit_plots, plots


@pytest.fixture
def factors():
    A, G = torch.diag(0.5 ** torch.arange(12.0)), torch.diag(0.3 ** torch.arange(5.0))
    return LayerFactors(A=A, G=G, num_inputs=10, num_gradients=10)


def test_the_staircase_is_drawn_where_the_kept_pairs_end(factors):
    figure = plots.spectrum(factors, 0.9, "fc")
    axes = figure.axes[0]
    edge = axes.lines[1].get_xdata()
    columns = select_staircase(factors.basis.lam, factors.basis.mu, 0.9).columns
    assert (edge[:-1] - 1).tolist() == columns.tolist()
    assert axes.get_title() == "Curvature mass of fc"
    assert f"kept: {int(columns.sum())} of 60 pairs" in axes.get_legend().get_texts()[0].get_text()


def test_energy_curves_show_every_metric():
    row = {"memorized": 0.1, "recovered": 0.2, "val_accuracy": 0.3, "clean_train": 0.4}
    axes = plots.energy_curves({0.9: row, 0.5: row}, row, 0.9).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()][-1] == "chosen: 0.9"
    assert list(axes.lines[0].get_xdata()) == [0.5, 0.9]
    assert list(axes.lines[0].get_ydata()) == [10.0, 10.0]
    assert len(plots.energy_curves({0.9: row}, row).axes[0].lines) == 8


def test_noised_examples_show_only_noised_ones(tmp_path):
    clean = torch.tensor([0, 1, 2, 3])
    noised = torch.tensor([0, 2, 0, 1])
    figure = plots.noised_examples(torch.rand(4, 8, 8), noised, clean, noised, torch.tensor([0, 1, 0, 2]))
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["true 1, given 2\nsays 2 → 1", "true 2, given 0\nsays 0 → 0", "true 3, given 1\nsays 1 → 2"]
    plots.save(figure, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_choice_curves_mark_the_edit_that_was_chosen():
    rows = [
        {"edit": name, "budget": budget, "training error": error, "validation error": 0.3, "validation loss": 1.0}
        for name in ("one", "other")
        for budget, error in ((0.0, 0.0), (0.01, 0.1), (0.02, 0.2))
    ]
    one, other = edit_plots.choice_curves(rows, "other", 0.02).axes
    assert [axes.get_title() for axes in (one, other)] == ["one", "other"]
    assert list(one.lines[0].get_xdata()) == [0.01, 0.02]
    assert list(one.lines[0].get_ydata()) == [90.0, 80.0]
    assert len(one.lines) == 4  # two rates, each with what it was
    assert other.get_legend().get_texts()[-1].get_text() == "chosen: 0.02"
    assert len(edit_plots.choice_curves(rows, "other", 0.0).axes[1].lines) == 4
