"""Scores of explanation methods side by side: a box for each method."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bcos_train.report.gallery import MUTED

__all__ = ["box_plot"]

#: The smallest score that a logarithmic axis shows.
LEAST = 1e-9
BOX, FILL, MEDIAN, MEAN = "#374151", "#bfdbfe", "#1d4ed8", "#111827"


def box_plot(
    scores: Mapping[str, Tensor],
    title: str,
    axis: str,
    *,
    uniform: float | None = None,
    missing: Sequence[str] = (),
    limits: tuple[float, float] | None = None,
    logarithmic: bool = False,
) -> Figure:
    """Draw the distribution of each method's scores.

    A box goes from the 25th to the 75th percentile, its line is the median, a diamond the mean; whiskers end at the
    last score within 1.5 box lengths, and what lies beyond is a dot.

    Args:
        scores: method -> scores of any shape, at least one.
        title: above the picture.
        axis: what the scores are.
        uniform: dashed line: what an explanation scores that is the same everywhere.
        missing: methods without scores, named below the picture.
        limits: of the axis; None: those of the scores.
        logarithmic: for scores of which only the magnitude is of interest; smaller ones than 1e-9 are drawn as that.

    Raises:
        ValueError: no method has scores.
    """
    flat = {name: found.detach().cpu().double().flatten() for name, found in scores.items()}
    values = {
        name: found[found.isfinite()].clamp(min=LEAST if logarithmic else -math.inf).numpy()
        for name, found in flat.items()
        if found.isfinite().any()
    }
    if not values:
        raise ValueError("no method has scores to draw")
    names = list(values)
    figure = Figure(figsize=(max(3.6, 1.0 + 0.85 * len(names)), 3.6), facecolor="white", layout="constrained")
    ax = figure.add_subplot()
    ax.boxplot(
        list(values.values()),
        widths=0.55,
        showmeans=True,
        patch_artist=True,
        boxprops={"facecolor": FILL, "edgecolor": BOX, "linewidth": 0.9},
        whiskerprops={"color": BOX, "linewidth": 0.9},
        capprops={"color": BOX, "linewidth": 0.9},
        medianprops={"color": MEDIAN, "linewidth": 1.6},
        meanprops={"marker": "D", "markersize": 4, "markerfacecolor": MEAN, "markeredgecolor": "none"},
        flierprops={"marker": ".", "markersize": 3, "markerfacecolor": MUTED, "markeredgecolor": "none"},
    )
    _label(ax, names, axis, title)
    if uniform is not None:
        ax.axhline(uniform, color=MUTED, linestyle="--", linewidth=1, zorder=0)
        ax.text(1.01, uniform, "uniform", transform=ax.get_yaxis_transform(), va="center", fontsize=7.5, color=MUTED)
    if logarithmic:
        ax.set_yscale("log")
    if limits is not None:
        margin = 0.03 * (limits[1] - limits[0])
        ax.set_ylim(limits[0] - margin, limits[1] + margin)
    if missing:
        note = textwrap.fill("not measured: " + ", ".join(missing), int(figure.get_figwidth() * 15))
        figure.supxlabel(note, fontsize=7.5, color=MUTED)
    return figure


def _label(ax: Axes, names: list[str], axis: str, title: str) -> None:
    ax.set_xticks(range(1, len(names) + 1), names, rotation=30, ha="right", rotation_mode="anchor", fontsize=9)
    ax.set_ylabel(axis, fontsize=9)
    ax.set_title(title, loc="left", fontsize=10, weight="bold")
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
