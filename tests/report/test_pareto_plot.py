"""Figure of a Pareto front."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from bcos_train.report import pareto_plot, save_gallery

SCORES = {"energy": [0.5, 0.6, 0.4], "IoU": [0.1, 0.2, 0.3]}


def _figure(runs: list[str], labels: list[str]) -> Figure:
    return pareto_plot([0.8, 0.7, 0.9], SCORES, labels, [0, 1], runs=runs, title="front", axis="F1", uniform=0.2)


def test_the_front_is_drawn_with_its_labels(tmp_path: Path) -> None:
    figure = _figure(["run"] * 3, ["a", "b", "c"])
    for axes, name in zip(figure.axes, SCORES, strict=True):
        others, front = axes.collections
        assert others.get_offsets().tolist() == [[0.9, SCORES[name][2]]]
        assert front.get_offsets().tolist() == [[0.8, SCORES[name][0]], [0.7, SCORES[name][1]]]
        assert [text.get_text() for text in axes.texts] == ["a", "b"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("F1", name)
    assert figure.legends == []
    save_gallery(tmp_path / "front.png", figure)
    assert imread(tmp_path / "front.png").shape[1] > 800


def test_runs_have_colors_and_a_legend() -> None:
    figure = _figure(["first", "second", "first"], ["1", "1", "2"])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["first", "second"]
    for axes in figure.axes:
        pale, front, _, other_front = axes.collections
        assert pale.get_facecolor()[0, :3].tolist() == front.get_facecolor()[0, :3].tolist()
        assert other_front.get_facecolor().tolist() != front.get_facecolor().tolist()


@pytest.mark.parametrize("label", ["12", "a label of many words"])
def test_labels_stay_in_their_panels(label: str) -> None:
    figure = _figure(["run"] * 3, [label] * 3)
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in axes.texts:
            box = text.get_window_extent().transformed(axes.transAxes.inverted())
            assert box.x0 > 0
            assert box.x1 < 1
