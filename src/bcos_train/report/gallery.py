"""A page of explained samples: image, color explanation and contribution map side by side.

Axes: N samples, C = 6 encoded channels [r, g, b, 1-r, 1-g, 1-b], H, W pixels, K classes.
"""

import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from bcos_train.explanation import Explanation, color_explanation, plot_contribution_map
from bcos_train.utils.atomic import atomic_write
from bcos_train.utils.terminal import printable

__all__ = ["gallery", "save_gallery", "short_class_name"]

RIGHT, WRONG, MUTED, FRAME = "#1a7f37", "#c9252d", "#6b7280", "#d1d5db"
COLUMN_NAMES = ("image", "explanation", "contributions")
LEGEND = "red: evidence for the class, blue: against it"

# Lengths in inches.
PICTURE = 1.15  # the width of a picture; three of them hold the longest title
GAP = 0.06  # between the pictures of a sample
TITLE = 0.24  # the line above a sample
SAMPLE_GAP = (0.4, 0.14)  # between samples, across and down
MARGIN = 0.3
HEADER = 0.5  # title and metrics
COLUMN_HEAD = 0.18
FOOTER = 0.62  # color bar and legend

ASPECT = 1.3  # target width / height of the page
NAME_LENGTH = 18  # characters of a class name
SHARP = 96  # images up to this height in pixels are drawn without interpolation


@dataclass(frozen=True)
class Layout:
    """Layout of a page of N samples; lengths in inches from the top left corner."""

    columns: int
    rows: int
    picture: tuple[float, float]
    note: float = 0.0  # the line below a sample

    @property
    def sample(self) -> tuple[float, float]:
        return 3 * self.picture[0] + 2 * GAP, TITLE + self.picture[1] + self.note

    @property
    def page(self) -> tuple[float, float]:
        (width, height), (across, down) = self.sample, SAMPLE_GAP
        return (
            2 * MARGIN + self.columns * width + (self.columns - 1) * across,
            MARGIN + HEADER + COLUMN_HEAD + self.rows * (height + down) + FOOTER,
        )

    def corner(self, index: int) -> tuple[float, float]:
        row, column = divmod(index, self.columns)
        (width, height), (across, down) = self.sample, SAMPLE_GAP
        return MARGIN + column * (width + across), MARGIN + HEADER + COLUMN_HEAD + row * (height + down)

    def add_axes(self, figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
        page_width, page_height = self.page
        bottom = page_height - top - height
        return figure.add_axes((left / page_width, bottom / page_height, width / page_width, height / page_height))


def gallery(
    images: Tensor,
    explanation: Explanation,
    labels: Tensor,
    class_names: Sequence[str],
    *,
    probabilities: Tensor | None = None,
    title: str = "",
    epoch: int | None = None,
    accuracy: float | None = None,
    max_samples: int = 15,
    smooth: int | Literal["auto"] = "auto",
    alpha_percentile: float = 99.5,
) -> Figure:
    """Draw each sample's image, color explanation and contribution map, titled with prediction and label.

    Correct predictions have a green title with a tick; wrong ones have a red title with a cross, and the label at the
    right. If the explained class is not the prediction, it is named there instead. All contribution maps share one
    scale, that of the strongest (its 99.5th percentile), so a pale map holds little evidence. The figure is
    independent of pyplot and needs no display.

    Args:
        images: (N, 6, H, W) in [0, 1], as explained.
        explanation: Explanation of these images.
        labels: (N,) class indices.
        class_names: K names, shown up to the first comma ("golden_retriever, Canis ...") and shortened.
        probabilities: (N, K) in [0, 1], shown beside the classes: sigmoids of the logits for networks trained with
            binary cross-entropy, softmax for cross-entropy. ``None``: not shown.
        title: Headline.
        epoch: Epoch, shown below the headline.
        accuracy: Accuracy of the whole evaluation in [0, 1], shown below the headline.
        max_samples: Number of samples to draw at most; the first ones are drawn.
        smooth: As for :func:`~bcos_train.explanation.color_explanation`; "auto": the usual 15 pixels at a height of 224
            and in proportion otherwise (3 at 32), so that small images keep their detail.
        alpha_percentile: As for :func:`~bcos_train.explanation.color_explanation`.

    Raises:
        ValueError: There is no sample, lengths differ, or there are fewer names than classes.
    """
    _check(images, explanation, labels, class_names, probabilities, max_samples)
    n_samples, (height, width) = min(len(images), max_samples), images.shape[2:]
    x = images[:n_samples].detach().cpu().float()
    # Galleries of diverged networks must not fail: NaN is drawn as no evidence.
    weights, maps = (
        torch.nan_to_num(tensor[:n_samples].detach().cpu().float(), 0.0, 0.0, 0.0)
        for tensor in (explanation.weights, explanation.contribution_map)
    )
    window = smoothing_window(smooth, height)
    colors = on_white(color_explanation(x, weights, window, alpha_percentile), maps, window)
    scale = float(torch.quantile(maps.abs().flatten(1), 0.995, dim=1).max()) or 1.0

    layout = choose_layout(n_samples, height, width)
    figure = Figure(figsize=layout.page, facecolor="white")
    draw_header(figure, layout, title, epoch, accuracy)
    for n in range(n_samples):
        axes = sample_axes(figure, layout, n)
        _draw_pictures(axes, x[n, :3], colors[n], maps[n], scale)
        shares = None if probabilities is None else probabilities[n].detach().cpu()
        prediction, label, target = (int(values[n]) for values in (explanation.prediction, labels, explanation.target))
        _title_sample(axes, prediction, label, target, class_names, shares)
    _draw_color_bar(figure, layout, scale)
    return figure


def save_gallery(path: str | os.PathLike[str], figure: Figure, *, dpi: int = 150, max_bytes: int = 2_000_000) -> None:
    """Save a figure as PNG, atomically.

    Args:
        path: File in an existing folder.
        figure: The figure.
        dpi: Resolution in pixels per inch.
        max_bytes: The resolution is reduced, not below 60 dpi, until the file has at most this size.
    """
    while True:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        if buffer.tell() <= max_bytes or dpi <= 60:
            break
        dpi = max(60, int(dpi * 0.8))
    with atomic_write(Path(path)) as temporary:
        temporary.write_bytes(buffer.getvalue())


def _check(
    images: Tensor,
    explanation: Explanation,
    labels: Tensor,
    class_names: Sequence[str],
    probabilities: Tensor | None,
    max_samples: int,
) -> None:
    if images.ndim != 4 or images.shape[1] != 6 or len(images) == 0:
        raise ValueError(f"images must be (N, 6, H, W) with N >= 1, got {tuple(images.shape)}")
    if max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")
    n_images, n_classes = explanation.logits.shape
    if not len(images) == len(labels) == n_images:
        raise ValueError(f"got {len(images)} images, {n_images} explanations and {len(labels)} labels")
    if len(class_names) < n_classes:
        raise ValueError(f"{n_classes} classes need {n_classes} names, got {len(class_names)}")
    if probabilities is not None and probabilities.shape != explanation.logits.shape:
        raise ValueError(f"probabilities must be {(n_images, n_classes)}, got {tuple(probabilities.shape)}")


def choose_layout(n_samples: int, height: int, width: int, note: float = 0.0) -> Layout:
    """Choose the number of columns for a page close to ASPECT with few empty places."""
    picture, numbers = (PICTURE, PICTURE * height / width), range(1, min(n_samples, 6) + 1)
    layouts = [Layout(columns, math.ceil(n_samples / columns), picture, note) for columns in numbers]

    def badness(layout: Layout) -> float:
        empty = layout.columns * layout.rows - n_samples
        return abs(math.log(layout.page[0] / layout.page[1] / ASPECT)) + empty / n_samples

    return min(layouts, key=badness)


def sample_axes(figure: Figure, layout: Layout, index: int, names: Sequence[str] = COLUMN_NAMES) -> list[Axes]:
    """Add the axes of a sample's three pictures, with the names of the columns above the first row."""
    left, top = layout.corner(index)
    width, height = layout.picture
    axes = [layout.add_axes(figure, left + i * (width + GAP), top + TITLE, width, height) for i in range(3)]
    for ax, name in zip(axes, names, strict=True):
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set(color=FRAME, linewidth=0.6)
        if index < layout.columns:
            offset = (TITLE + 0.03) / height
            ax.text(0.5, 1 + offset, name, transform=ax.transAxes, ha="center", va="bottom", fontsize=7, color=MUTED)
    return axes


def _draw_pictures(axes: list[Axes], rgb: Tensor, color: Tensor, contributions: Tensor, scale: float) -> None:
    axes[0].imshow(rgb.clamp(0, 1).permute(1, 2, 0).numpy())
    axes[1].imshow(color.numpy())
    plot_contribution_map(contributions, axes[2], vrange=scale, percentile=100)
    set_interpolation(axes, len(contributions))


def set_interpolation(axes: Sequence[Axes], height: int) -> None:
    """Show the pixels of pictures with a small height in pixels, and interpolate others."""
    for ax in axes:
        ax.images[0].set_interpolation("nearest" if height <= SHARP else "antialiased")


def _title_sample(
    axes: list[Axes], prediction: int, label: int, target: int, class_names: Sequence[str], shares: Tensor | None
) -> None:
    def named(index: int) -> str:
        return figure_text(short_class_name(class_names[index])) + (
            "" if shares is None else f" ({_percent(float(shares[index]))})"
        )

    right = prediction == label
    axes[0].set_title(
        f"{'✓' if right else '✗'} {named(prediction)}",
        loc="left",
        color=RIGHT if right else WRONG,
        weight="bold",
        fontsize=8,
        pad=3.5,
    )
    if target != prediction:
        # There is room for one name: the explained class matters most.
        note = f"{'label, explained' if target == label else 'explained'}: {named(target)}"
    else:
        note = "" if right else f"label {named(label)}"
    axes[2].set_title(note, loc="right", color=MUTED, fontsize=8, pad=3.5)


def draw_header(
    figure: Figure, layout: Layout, title: str, epoch: int | None, accuracy: float | None, note: str = ""
) -> None:
    """Draw the headline, and below it the epoch, the accuracy in [0, 1] and a note."""
    width, height = layout.page
    facts = [] if epoch is None else [f"epoch {epoch}"]
    facts += [] if accuracy is None else [f"accuracy {accuracy:.1%}"]
    facts += [note] if note else []
    headline = figure_text(shorten(title, int((width - 2 * MARGIN) / 0.115)))
    figure.text(MARGIN / width, 1 - MARGIN / height, headline, fontsize=12, weight="bold", va="top")
    figure.text(MARGIN / width, 1 - (MARGIN + 0.24) / height, " · ".join(facts), fontsize=9, color=MUTED, va="top")


def _draw_color_bar(figure: Figure, layout: Layout, scale: float) -> None:
    width, height = layout.page
    bar = layout.add_axes(figure, (width - 2.6) / 2, height - FOOTER + 0.08, 2.6, 0.09)
    mappable = ScalarMappable(Normalize(-scale, scale), cmap="bwr")
    colorbar = figure.colorbar(mappable, cax=bar, orientation="horizontal", ticks=[-scale, 0, scale])
    colorbar.ax.set_xticklabels([f"−{scale:.2g}", "0", f"+{scale:.2g}"])
    colorbar.ax.tick_params(labelsize=7, length=2, pad=2, color=FRAME, labelcolor=MUTED)
    colorbar.outline.set(edgecolor=FRAME, linewidth=0.6)
    colorbar.set_label(LEGEND, fontsize=7.5, color=MUTED, labelpad=2)


def smoothing_window(smooth: int | str, height: int) -> int:
    """Return the window in pixels; "auto": the odd number nearest to 15 at a height of 224."""
    if not isinstance(smooth, str):
        return smooth
    if smooth != "auto":
        raise ValueError(f'smooth must be "auto" or a number of pixels, got {smooth!r}')
    return 2 * round((15 * height / 224 - 1) / 2) + 1


def on_white(rgba: Tensor, maps: Tensor, window: int) -> Tensor:
    """Blend RGBA images (N, H, W, 4) with white: (N, H, W, 3).

    Windows in which every pixel is evidence against the class are not drawn: if nearly the whole image is, the official
    normalization of the opacity makes everything opaque.
    """
    shown = (maps >= 0).float()
    if window > 1:
        before, after = (window - 1) // 2, window // 2
        shown = F.max_pool2d(F.pad(shown, (before, after, before, after)), window, stride=1)
    alpha = rgba[..., 3:] * shown[..., None]
    return rgba[..., :3] * alpha + (1 - alpha)


def short_class_name(name: str) -> str:
    """Shorten a class name for a figure: up to the first comma, at most 18 characters."""
    return shorten(str(name).split(",")[0].replace("_", " ").strip(), NAME_LENGTH)


def figure_text(text: str) -> str:
    """Return text that others chose so that matplotlib draws it literally: no formulas, no undrawable characters."""
    return printable(text, keep="").replace("$", r"\$")


def shorten(text: str, length: int) -> str:
    """Shorten a text to ``length`` characters, the last of which is then an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _percent(share: float) -> str:
    """Format as a percentage, never as 0 % or 100 %, which would claim certainty."""
    if not math.isfinite(share):
        return "?"
    return "<1%" if share < 0.005 else ">99%" if share > 0.995 else f"{share:.0%}"
