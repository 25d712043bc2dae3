"""The gallery's content: titles, pictures, scale, layout; and that nothing is clipped."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from bcos_train.explanation import Explanation, color_explanation
from bcos_train.report import gallery, save_gallery

NAMES = ["cat", "golden_retriever, Canis familiaris", "a_class_with_a_very_long_name_indeed", "ox"]


def batch(n: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> tuple[torch.Tensor, Explanation]:
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(n, 3, height, width, generator=generator)
    x, weights = torch.cat([rgb, 1 - rgb], 1), torch.randn(n, 6, height, width, generator=generator)
    logits = torch.randn(n, 4, generator=generator)
    prediction = torch.arange(n) % 4
    return x, Explanation(logits, prediction, prediction, weights, (x * weights).sum(1))


def titles(figure: Figure) -> list[tuple[str, str]]:
    axes = figure.axes[:-1]
    return [(axes[i].get_title(loc="left"), axes[i + 2].get_title(loc="right")) for i in range(0, len(axes), 3)]


@pytest.mark.parametrize(
    ("n", "size"),
    [(1, (8, 8)), (2, (90, 60)), (3, (60, 90)), (7, (32, 32)), (16, (32, 32)), (32, (8, 8)), (1, (224, 224))],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"{value}-samples",
)
def test_all_text_and_pictures_lie_on_the_page_without_overlap(n: int, size: tuple[int, int]):
    x, explanation = batch(min(n, 4), *size)
    repeat = torch.arange(n) % len(x)
    x, explanation = x[repeat], Explanation(*(value[repeat] for value in vars(explanation).values()))
    figure = gallery(
        x,
        explanation,
        torch.full((n,), 2),
        NAMES,
        probabilities=torch.full((n, 4), 0.42),
        title="imagenet/resnet50/" + "long-" * 40,
        epoch=89,
        accuracy=0.7629,
        max_samples=32,
    )
    assert len(figure.axes) == 3 * n + 1
    figure.draw_without_rendering()
    page, bar = figure.bbox, figure.axes[-1].get_tightbbox()
    pictures = [ax.get_window_extent() for ax in figure.axes[:-1]]
    texts = [text.get_window_extent() for text in figure.texts]
    for box in [*texts, *(ax.get_tightbbox() for ax in figure.axes)]:
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
    for i in range(0, 3 * n, 3):
        left, right = figure.axes[i]._left_title, figure.axes[i + 2]._right_title
        assert left.get_window_extent().x1 <= right.get_window_extent().x0
    assert len({round(box.width, 3) for box in pictures}) == 1
    for i, picture in enumerate(pictures):
        assert not any(picture.overlaps(other) for other in [*pictures[i + 1 :], *texts, bar])


def test_titles_mark_right_and_wrong_and_name_the_label():
    x, explanation = batch(4)
    probabilities = torch.tensor([[0.9] * 4, [0.001] * 4, [0.999] * 4, [0.25, 0.5, 0.125, 0.0625]])
    figure = gallery(x, explanation, torch.tensor([0, 1, 0, 1]), NAMES, probabilities=probabilities)
    assert titles(figure) == [
        ("✓ cat (90%)", ""),
        ("✓ golden retriever (<1%)", ""),
        ("✗ a class with a ve… (>99%)", "label cat (>99%)"),
        ("✗ ox (6%)", "label golden retriever (50%)"),
    ]
    colors = [figure.axes[i]._left_title.get_color() for i in range(0, 12, 3)]
    assert colors[0] == colors[1] != colors[2] == colors[3]


def test_titles_without_probabilities_and_with_another_class_explained():
    x, explanation = batch(3)
    explanation = Explanation(
        explanation.logits,
        torch.tensor([0, 0, 0]),
        torch.tensor([3, 3, 0]),
        explanation.weights,
        explanation.contribution_map,
    )
    figure = gallery(x, explanation, torch.tensor([3, 1, 0]), NAMES)
    assert titles(figure) == [("✗ cat", "label, explained: ox"), ("✗ cat", "explained: ox"), ("✓ cat", "")]


def test_header_and_column_names():
    x, explanation = batch(2)
    figure = gallery(x, explanation, explanation.target, NAMES, title="digits/resnet20/x", epoch=3, accuracy=0.5)
    assert [text.get_text() for text in figure.texts] == ["digits/resnet20/x", "epoch 3 · accuracy 50.0%"]
    assert [ax.texts[0].get_text() for ax in figure.axes[:3]] == ["image", "explanation", "contributions"]
    assert figure.axes[-1].get_xlabel() == "red: evidence for the class, blue: against it"


def test_pictures_show_the_image_the_explanation_on_white_and_the_map():
    x, explanation = batch(2)
    figure = gallery(x, explanation, explanation.target, NAMES, smooth=3, alpha_percentile=90)
    rgba = color_explanation(x, explanation.weights, 3, 90)
    for n in range(2):
        image, color, contributions = (figure.axes[3 * n + i].images[0] for i in range(3))
        np.testing.assert_allclose(image.get_array(), x[n, :3].permute(1, 2, 0))
        expected = rgba[n, ..., :3] * rgba[n, ..., 3:] + 1 - rgba[n, ..., 3:]
        np.testing.assert_allclose(color.get_array(), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(contributions.get_array(), explanation.contribution_map[n])
        low, high = contributions.get_clim()
        assert -low == high > 0
    limits = {figure.axes[i].images[0].get_clim() for i in (2, 5)}
    assert limits == {figure.axes[-1].get_xlim()}  # one scale, that of the colour bar


def test_explanation_is_blank_where_all_evidence_is_negative():
    x, explanation = batch(1)
    weights = -torch.rand_like(x)
    weights[0, :, 10, 20] = 1
    explanation = Explanation(
        explanation.logits, explanation.prediction, explanation.target, weights, (x * weights).sum(1)
    )
    picture = gallery(x, explanation, explanation.target, NAMES, smooth=3).axes[1].images[0].get_array()
    drawn = np.argwhere((picture < 1).any(axis=2))
    assert drawn.min(axis=0).tolist() == [9, 19]
    assert drawn.max(axis=0).tolist() == [11, 21]


@pytest.mark.parametrize(("size", "interpolation"), [(32, "nearest"), (224, "antialiased")])
def test_small_images_show_their_pixels(size: int, interpolation: str):
    x, explanation = batch(1, size, size)
    figure = gallery(x, explanation, explanation.target, NAMES)
    assert {ax.images[0].get_interpolation() for ax in figure.axes[:3]} == {interpolation}


@pytest.mark.parametrize(("height", "window"), [(8, 1), (28, 1), (32, 3), (64, 5), (224, 15), (448, 29)])
def test_smoothing_in_proportion(height: int, window: int):
    x, explanation = batch(1, height, height)
    automatic = gallery(x, explanation, explanation.target, NAMES).axes[1].images[0].get_array()
    by_hand = gallery(x, explanation, explanation.target, NAMES, smooth=window).axes[1].images[0].get_array()
    np.testing.assert_array_equal(automatic, by_hand)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_degenerate_explanations_are_drawn_without_warnings(value: float, tmp_path):
    x, explanation = batch(2)
    weights = torch.full_like(x, value)
    explanation = Explanation(
        torch.full((2, 4), value), explanation.prediction, explanation.target, weights, (x * weights).sum(1)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = gallery(x, explanation, explanation.target, NAMES, probabilities=explanation.logits.sigmoid())
        save_gallery(tmp_path / "page.png", figure)


def test_first_samples_only_and_no_pyplot_figure():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    x, explanation = batch(32)
    figure = gallery(x, explanation, explanation.target, NAMES, max_samples=5)
    assert len(figure.axes) == 3 * 5 + 1
    assert plt.get_fignums() == before


def test_photographs_fit_into_the_size_limit(tmp_path):
    x, explanation = batch(2, 224, 224)  # noise: the worst case for PNG
    figure = gallery(x, explanation, explanation.target, NAMES)
    save_gallery(tmp_path / "full.png", figure)
    save_gallery(tmp_path / "small.png", figure, max_bytes=150_000)
    assert (tmp_path / "full.png").stat().st_size <= 2_000_000
    assert (tmp_path / "small.png").stat().st_size <= 150_000
    full, small = imread(tmp_path / "full.png"), imread(tmp_path / "small.png")
    assert full.shape[0] > small.shape[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.rand(2, 3, 8, 8)}, r"\(N, 6, H, W\) with N >= 1, got \(2, 3, 8, 8\)"),
        ({"images": torch.rand(0, 6, 8, 8)}, "N >= 1"),
        ({"labels": torch.zeros(3)}, "2 images, 2 explanations and 3 labels"),
        ({"class_names": ["a"]}, "4 classes need 4 names, got 1"),
        ({"probabilities": torch.rand(2, 3)}, r"must be \(2, 4\), got \(2, 3\)"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"smooth": "none"}, "smooth must be \"auto\" or a number of pixels, got 'none'"),
    ],
    ids=["channels", "empty", "labels", "names", "probabilities", "max-samples", "smooth"],
)
def test_wrong_arguments(change: dict, message: str):
    x, explanation = batch(2, 8, 8)
    valid = {"images": x, "explanation": explanation, "labels": torch.zeros(2), "class_names": NAMES}
    with pytest.raises(ValueError, match=message):
        gallery(**(valid | change))


@pytest.mark.parametrize("name", ["$\\frac{$", "caf\udce9", "a\x1b[2Jb", "$x$", "[/b]"], ids=ascii)
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path):
    x, explanation = batch()
    figure = gallery(x, explanation, torch.zeros(4), [name] * 4, title=name)
    save_gallery(tmp_path / "gallery.png", figure, dpi=60)
    assert (tmp_path / "gallery.png").stat().st_size > 1000
