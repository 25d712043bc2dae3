"""The gallery of a teacher and its student: what is in which column, and that nothing is clipped."""

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

from bcos_train.explanation import color_explanation
from bcos_train.report import Explained, pair_gallery

NAMES = ["cat", "golden_retriever, Canis familiaris", "ox", "deer"]
SIMILARITY = torch.tensor([0.5, -0.25, 1.0, 0.125])


def page(n: int = 4, height: int = 32, width: int = 32, is_color: bool = True, **changes: Any) -> tuple[Figure, Any]:
    generator = torch.Generator().manual_seed(0)
    shape = (n, 6, height, width) if is_color else (n, height, width)
    rgb = torch.rand(n, 3, height, width, generator=generator)
    ours, theirs = (torch.randn(shape, generator=generator) for _ in range(2))
    prediction = torch.arange(n) % 4
    values = {
        "rgb": rgb,
        "teacher": Explained(prediction, theirs),
        "student": Explained(3 - prediction, ours),
        "labels": prediction,
        "class_names": NAMES,
        "similarity": SIMILARITY.repeat(8)[:n],
        **changes,
    }
    return pair_gallery(**values), values


def picture(figure: Figure, sample: int, column: int) -> Any:
    return figure.axes[3 * sample + column].images[0].get_array()


def on_white(rgb: Tensor, weights: Tensor) -> Tensor:
    rgba = color_explanation(torch.cat([rgb, 1 - rgb], 1), weights, 3, 99.5)
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def test_image_teacher_and_student_in_this_order() -> None:
    figure, values = page()
    assert [ax.texts[0].get_text() for ax in figure.axes[:3]] == ["image", "teacher", "student"]
    teacher, student = (on_white(values["rgb"], values[name].explanation) for name in ("teacher", "student"))
    for n in range(4):
        np.testing.assert_allclose(picture(figure, n, 0), values["rgb"][n].permute(1, 2, 0))
        np.testing.assert_allclose(picture(figure, n, 1), teacher[n], rtol=0, atol=1e-6)
        np.testing.assert_allclose(picture(figure, n, 2), student[n], rtol=0, atol=1e-6)


def test_maps_have_a_scale_each() -> None:
    figure, values = page(is_color=False)
    for column, name in ((1, "teacher"), (2, "student")):
        for n, values_of_map in enumerate(values[name].explanation):
            limit = float(torch.quantile(values_of_map.abs().flatten(), 0.995))
            np.testing.assert_allclose(picture(figure, n, column), values_of_map.clamp(-limit, limit), rtol=1e-5)
            low, high = figure.axes[3 * n + column].images[0].get_clim()
            assert -low == high == pytest.approx(limit)
    expected = "red: for the teacher's prediction, blue: against it; each map in its own scale"
    assert figure.axes[-1].get_xlabel() == expected


def test_titles_name_label_predictions_and_similarity() -> None:
    figure, _ = page(title="digits/resnet20/x", epoch=3, accuracy=0.5)
    titles = [ax.get_title(loc="left") for ax in figure.axes[:12]]
    assert titles[:6] == ["cat", "✓ cat", "✗ deer", "golden retri…", "✓ golden retri…", "✗ ox"]
    colors = [ax._left_title.get_color() for ax in figure.axes[:3]]  # type: ignore[attr-defined]
    assert len(set(colors)) == 3
    notes = [ax.texts[-1].get_text() for ax in figure.axes[2:12:3]]
    assert notes == ["similarity 0.50", "similarity -0.25", "similarity 1.00", "similarity 0.12"]
    expected = ["digits/resnet20/x", "epoch 3 · accuracy 50.0% · mean similarity 0.34"]
    assert [text.get_text() for text in figure.texts[:2]] == expected
    assert figure.texts[2].get_text() == "explained: the teacher's prediction"


def test_several_labels() -> None:
    figure, _ = page(3, labels=torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:3] == ["cat +1", "✓ cat", "✓ deer"]
    assert titles[3:6] == ["golden retri…", "✓ golden retri…", "✗ ox"]
    assert titles[6:] == ["no label", "✗ ox", "✗ golden retri…"]


def test_degenerate_explanations_are_drawn() -> None:
    for shape in ((2, 6, 8, 8), (2, 8, 8)):
        broken = Explained(torch.zeros(2, dtype=torch.long), torch.full(shape, float("nan")))
        pair = {"teacher": broken, "student": broken, "similarity": torch.full((2,), float("nan"))}
        page(2, 8, 8, **pair)[0].draw_without_rendering()


@pytest.mark.parametrize("is_color", [True, False])
@pytest.mark.parametrize(("n", "size"), [(1, (8, 8)), (3, (60, 90)), (16, (32, 32)), (2, (224, 224))])
def test_all_text_and_pictures_lie_on_the_page_without_overlap(n: int, size: tuple[int, int], is_color: bool) -> None:
    names = ["Common_mammoth", *NAMES[1:]]
    title = "imagenet/resnet50/" + "long-" * 40
    figure, _ = page(n, *size, is_color, class_names=names, title=title, epoch=89, accuracy=0.7629)
    figure.draw_without_rendering()
    sheet, axes = figure.bbox, figure.axes[: 3 * n]
    texts = [text.get_window_extent() for text in figure.texts]
    texts += [text.get_window_extent() for ax in axes for text in (*ax.texts, ax._left_title)]  # type: ignore[attr-defined]
    texts += [ax.get_tightbbox() for ax in figure.axes[3 * n :]]
    pictures = [ax.get_window_extent() for ax in axes]
    boxes = [box for box in (*texts, *pictures) if box.width]
    for i, box in enumerate(boxes):
        assert sheet.x0 <= box.x0 < box.x1 <= sheet.x1
        assert sheet.y0 <= box.y0 < box.y1 <= sheet.y1
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
