"""Every analysis draws itself."""

import torch

from lightning_curvature import CurvatureEditor, KroneckerFactors
from lightning_curvature.analysis import compare_bands, detect, direction_use, interplay
from lightning_curvature.analysis.bands import draw_bands
from lightning_curvature.analysis.directions import draw_precision
from tests.support.axes import axis, diagonal, mixture
from tests.support.pair import Pair


def test_every_analysis_draws_itself():
    factors, weight = diagonal(range(20, 0, -1)), torch.ones(1, 20)
    comparison = compare_bands("fc", weight, factors, mixture([1, 2, 3, 4]), mixture([4, 3, 2, 1]))
    (axes,) = (axes for axes in draw_bands([comparison]).axes if axes.axison)
    assert axes.lines[0].get_label() == "curvature"
    torch.testing.assert_close(torch.tensor(axes.lines[0].get_ydata()).float(), torch.tensor(comparison.ratio))
    assert len(draw_bands([comparison] * 4).axes) == 1
    detection = detect({"share": torch.tensor([3.0, 4.0])}, {"share": torch.tensor([1.0, 2.0])})
    assert detection.plot().axes[0].patches[0].get_width() == 1.0
    use = direction_use("fc", factors, torch.cat([axis(0), axis(19)]), [False, True], True, count=2, examples=1)
    assert draw_precision([use]).axes[0].lines[0].get_ydata().tolist() == sorted(use.precision, reverse=True)
    assert use.plot().axes[0].get_title().endswith("fc")
    assert comparison.plot().axes
    together = interplay(
        Pair(True),
        KroneckerFactors({"one": diagonal([9.0, 1.0], [1.0, 1.0])}),
        CurvatureEditor(0.9),
        {"a": ["one"]},
        lambda: {"loss": 1.0},
    )
    assert [bar.get_width() for bar in together.plot("loss").axes[0].patches] == [0.0, 0.0, 0.0]
