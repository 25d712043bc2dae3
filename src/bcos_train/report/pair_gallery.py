"""A page of samples explained by a teacher and its student: image, teacher and student side by side.

Axes: N samples, H, W pixels, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bcos_train.explanation import color_explanation, plot_contribution_map
from bcos_train.report.gallery import (
    FOOTER,
    GAP,
    MUTED,
    PICTURE,
    RIGHT,
    WRONG,
    Layout,
    choose_layout,
    draw_header,
    figure_text,
    on_white,
    sample_axes,
    set_interpolation,
    short_class_name,
    shorten,
    smoothing_window,
)
from bcos_train.report.maps import PERCENTILE, draw_scale

__all__ = ["Explained", "pair_gallery"]

NOTE = 0.17  # inches: the line below a sample
NAME_LENGTH = 13  # characters of a class name above a picture
COLOR_LEGEND = "explained: the teacher's prediction"
MAP_LEGEND = "red: for the teacher's prediction, blue: against it"


class Explained(NamedTuple):
    """What a network predicts for N samples, and its explanations of the classes that the teacher predicts.

    Attributes:
        prediction: (N,) class indices.
        explanation: W(x) (N, 6, H, W) of the encoded image, which is drawn in color, or maps (N, H, W).
    """

    prediction: Tensor
    explanation: Tensor


def pair_gallery(
    rgb: Tensor,
    teacher: Explained,
    student: Explained,
    labels: Tensor,
    class_names: Sequence[str],
    similarity: Tensor,
    *,
    title: str = "",
    epoch: int | None = None,
    accuracy: float | None = None,
) -> Figure:
    """Draw each image between its labels and the explanations of two networks, with their predictions and similarity.

    Correct predictions are green with a tick, wrong ones red with a cross. Each explanation has its own scale, which
    the similarity does not depend on either. The figure is independent of pyplot and needs no display.

    Args:
        rgb: (N, 3, H, W) in [0, 1], N >= 1.
        teacher, student: Explanations of the same kind.
        labels: (N,) class indices, or multi-hot (N, K).
        class_names: K names.
        similarity: (N,), written below the explanations; the mean is in the headline.
        title: Headline.
        epoch: Epoch, shown below the headline.
        accuracy: Accuracy of the student in the whole evaluation in [0, 1], shown below the headline.
    """
    n_samples, (height, width) = len(rgb), rgb.shape[2:]
    rgb, labels, similarity = (tensor.detach().cpu() for tensor in (rgb, labels, similarity))
    if labels.ndim == 1:
        labels = F.one_hot(labels, len(class_names))
    layout = choose_layout(n_samples, height, width, NOTE)
    figure = Figure(figsize=layout.page, facecolor="white")
    draw_header(figure, layout, title, epoch, accuracy, f"mean similarity {float(similarity.mean()):.2f}")
    pictures = [_pictures(rgb, network.explanation) for network in (teacher, student)]
    for n in range(n_samples):
        axes = sample_axes(figure, layout, n, ("image", "teacher", "student"))
        axes[0].imshow(rgb[n].clamp(0, 1).permute(1, 2, 0).numpy())
        _title(axes[0], _name(labels[n].nonzero()[:, 0], class_names), MUTED)
        for ax, picture, network in zip(axes[1:], pictures, (teacher, student), strict=True):
            if picture.ndim == 4:
                ax.imshow(picture[n].numpy())
            else:
                plot_contribution_map(picture[n], ax, percentile=PERCENTILE)
            prediction = network.prediction[n].cpu()
            is_right = bool(labels[n, prediction] > 0)
            mark, color = ("✓", RIGHT) if is_right else ("✗", WRONG)
            _title(ax, f"{mark} {_name(prediction[None], class_names)}", color, "bold")
        set_interpolation(axes, height)
        _note(axes[2], f"similarity {float(similarity[n]):.2f}")
    _draw_legend(figure, layout, is_color=pictures[0].ndim == 4)
    return figure


def _pictures(rgb: Tensor, explanation: Tensor) -> Tensor:
    """Return color explanations on white (N, H, W, 3), or maps (N, H, W)."""
    # Galleries of diverged networks must not fail: NaN is drawn as no evidence.
    explanation = torch.nan_to_num(explanation.detach().cpu().float(), 0.0, 0.0, 0.0)
    if explanation.ndim == 3:
        return explanation
    x, window = torch.cat([rgb, 1 - rgb], dim=1), smoothing_window("auto", rgb.shape[2])
    return on_white(color_explanation(x, explanation, window), (x * explanation).sum(1), window)


def _name(classes: Tensor, class_names: Sequence[str]) -> str:
    """Return the name of the first class, and the number of further ones."""
    names = [shorten(short_class_name(class_names[k]), NAME_LENGTH) for k in classes.tolist()]
    return figure_text(names[0]) + (f" +{len(names) - 1}" if len(names) > 1 else "") if names else "no label"


def _title(ax: Axes, text: str, color: str, weight: str = "normal") -> None:
    ax.set_title(text, loc="left", color=color, weight=weight, fontsize=7.5, pad=3.5)


def _note(student: Axes, text: str) -> None:
    """Write below the pictures of teacher and student, centered."""
    center = -GAP / 2 / PICTURE  # as a share of the picture's width
    student.annotate(
        text,
        (center, 0),
        xytext=(0, -2.5),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=7.5,
        color=MUTED,
    )


def _draw_legend(figure: Figure, layout: Layout, is_color: bool) -> None:
    width, height = layout.page
    if is_color:
        figure.text(0.5, FOOTER / 2 / height, COLOR_LEGEND, ha="center", va="center", fontsize=7.5, color=MUTED)
    else:
        draw_scale(figure, (width, height), MAP_LEGEND)
