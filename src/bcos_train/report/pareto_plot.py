"""Figure of a Pareto front of checkpoints: localization against classification."""

from collections.abc import Collection, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bcos_train.report.gallery import MUTED, figure_text

__all__ = ["pareto_plot"]

#: Colors of the runs, in their order; more runs than colors share them.
COLORS = ("#1d4ed8", "#c2410c", "#15803d", "#7e22ce", "#be185d", "#0f766e", "#a16207", "#374151")
#: Opacity of the points that are not on the front.
PALE = 0.35


def pareto_plot(
    x: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    front: Collection[int],
    *,
    runs: Sequence[str],
    title: str,
    axis: str,
    uniform: float | None = None,
) -> Figure:
    """Draw each score against ``x``, a point per checkpoint: those of the front with their labels, the others pale.

    Args:
        x: Score of the classification.
        scores: name -> localization scores, a panel each.
        labels: Label of each point; a short one, such as its epoch.
        front: Indices of the points on the front.
        runs: Run of each point. Each has a color; if there are several, a legend is below.
        title: Title of the figure.
        axis: Label of the x axis.
        uniform: Localization score of a uniform explanation, drawn as a dashed line.
    """
    colors = {run: COLORS[i % len(COLORS)] for i, run in enumerate(dict.fromkeys(runs))}
    n_lines = len(colors) if len(colors) > 1 else 0
    figure = Figure(figsize=(4.2 * len(scores), 3.8 + 0.17 * n_lines), facecolor="white", layout="constrained")
    figure.suptitle(figure_text(title), x=0.01, ha="left", fontsize=10, weight="bold")
    for ax, (name, y) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        for run, color in colors.items():
            points = [i for i in range(len(x)) if runs[i] == run]
            others, best = [i for i in points if i not in front], [i for i in points if i in front]
            ax.scatter([x[i] for i in others], [y[i] for i in others], s=16, color=color, alpha=PALE, linewidths=0)
            ax.scatter([x[i] for i in best], [y[i] for i in best], s=26, color=color, linewidths=0, zorder=3)
            _label(ax, [(x[i], y[i], labels[i]) for i in best], color, middle=(min(x) + max(x)) / 2)
        if uniform is not None:
            ax.axhline(uniform, color=MUTED, linestyle="--", linewidth=1, zorder=0)
        ax.margins(0.08)
        ax.set_xlabel(axis, fontsize=9)
        ax.set_ylabel(name, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(color="#e5e7eb", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    if n_lines:
        dots = [Line2D([], [], color=color, marker="o", linestyle="", markersize=4.5) for color in colors.values()]
        names = [figure_text(run) for run in colors]
        figure.legend(dots, names, loc="outside lower left", fontsize=8, frameon=False, handletextpad=0.2)
    return figure


def _label(ax: Axes, points: Sequence[tuple[float, float, str]], color: str, middle: float) -> None:
    """Write the labels above the points, towards the middle of the panel, so that none reaches out of it."""
    for x, y, label in points:
        side, offset = ("right", -2) if x > middle else ("left", 2)
        ax.annotate(label, (x, y), (offset, 3), textcoords="offset points", ha=side, fontsize=7, color=color)
