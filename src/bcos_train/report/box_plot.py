"""Box plots of scores, one box per explanation method."""

import math
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from bcos_train.report.gallery import MUTED, figure_text

__all__ = ["box_plot"]

#: Smallest score on a logarithmic axis.
MIN_LOG_SCORE = 1e-9
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

    A box spans the 25th to the 75th percentile; its line is the median, the diamond the mean. Whiskers end at the last
    score within 1.5 box lengths, and scores beyond are dots.

    Args:
        scores: method -> scores of any shape, at least one.
        title: Title of the figure.
        axis: Label of the score axis.
        uniform: Score of a uniform explanation, drawn as a dashed line.
        missing: Methods without scores, listed below the plot.
        limits: Limits of the score axis; ``None``: those of the scores.
        logarithmic: Use a logarithmic axis; scores below 1e-9 are drawn as 1e-9.

    Raises:
        ValueError: No method has finite scores.
    """
    flat = {name: tensor.detach().cpu().double().flatten() for name, tensor in scores.items()}
    values = {
        name: tensor[tensor.isfinite()].clamp(min=MIN_LOG_SCORE if logarithmic else -math.inf).numpy()
        for name, tensor in flat.items()
        if tensor.isfinite().any()
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
    ax.set_title(figure_text(title), loc="left", fontsize=10, weight="bold")
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
