"""Figure of a Pareto front."""

from pathlib import Path

from matplotlib.image import imread

from bcos_train.report import pareto_plot, save_gallery


def test_the_front_is_drawn_in_color_with_its_labels(tmp_path: Path) -> None:
    scores = {"energy": [0.5, 0.6, 0.4], "IoU": [0.1, 0.2, 0.3]}
    figure = pareto_plot([0.8, 0.7, 0.9], scores, ["a", "b", "c"], [0, 1], title="front", axis="F1", uniform=0.2)
    for axes, name in zip(figure.axes, scores, strict=True):
        others, front = axes.collections
        assert others.get_offsets().tolist() == [[0.9, scores[name][2]]]
        assert front.get_offsets().tolist() == [[0.8, scores[name][0]], [0.7, scores[name][1]]]
        assert [text.get_text() for text in axes.texts] == ["a", "b"]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("F1", name)
    save_gallery(tmp_path / "front.png", figure)
    assert imread(tmp_path / "front.png").shape[1] > 800
