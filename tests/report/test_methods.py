"""Box plots, and pictures in rows and columns."""

import pytest
import torch

from bcos_train.report import Panel, Row, box_plot, map_table


def test_a_box_for_each_method_and_a_line_for_uniform() -> None:
    scores = {"a": torch.tensor([[0.1, 0.2], [0.3, float("nan")]]), "b": torch.full((4,), 0.5)}
    figure = box_plot(scores, "title", "score", uniform=0.25, missing=["c"], limits=(0, 1))
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [line.get_ydata()[0] for line in dashed] == [0.25]
    assert figure.get_supxlabel() == "not measured: c"
    medians = [line.get_ydata()[0] for line in ax.lines if line.get_color() == "#1d4ed8"]
    assert medians == [pytest.approx(0.2), pytest.approx(0.5)]


def test_no_scores_at_all() -> None:
    with pytest.raises(ValueError, match="no method has scores"):
        box_plot({"a": torch.tensor([float("nan")])}, "", "")


def test_maps_have_their_own_symmetric_scales_and_lie_on_the_page() -> None:
    values = torch.linspace(-1, 3, 64).view(8, 8)
    panels = [
        Panel(torch.rand(8, 8, 3), "dog, 99%", (0, 4, 4, 4), n_cells=2),
        Panel(values),
        Panel(100 * values),
        Panel(None, "no"),
    ]
    figure = map_table(["image", "a", "b", "c"], [Row("label", panels)] * 2, "title")
    small, large = figure.axes[1].images[0], figure.axes[2].images[0]
    assert small.norm.vmin == -small.norm.vmax
    assert large.norm.vmax == pytest.approx(100 * small.norm.vmax)
    assert len(figure.axes[0].patches) == 1
    vertical, horizontal = figure.axes[0].lines
    assert list(vertical.get_xdata()) == list(horizontal.get_ydata()) == [3.5, 3.5]
    assert not figure.axes[1].lines
    assert [ax.get_title() for ax in figure.axes[:4]] == ["image", "a", "b", "c"]
    figure.draw_without_rendering()
    for ax in figure.axes:
        box = ax.get_tightbbox()
        assert box is not None
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1


def test_rows_and_columns_must_agree() -> None:
    with pytest.raises(ValueError, match="with 2 panels each"):
        map_table(["a", "b"], [Row("", [Panel(None)])], "")
