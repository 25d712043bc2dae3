"""Figure of a Pareto front of checkpoints: localization against classification."""

from collections.abc import Collection, Mapping, Sequence

from matplotlib.figure import Figure

from bcos_train.report.gallery import MUTED, figure_text

__all__ = ["pareto_plot"]

POINT, FRONT = "#9ca3af", "#1d4ed8"


def pareto_plot(
    x: Sequence[float],
    scores: Mapping[str, Sequence[float]],
    labels: Sequence[str],
    front: Collection[int],
    *,
    title: str,
    axis: str,
    uniform: float | None = None,
) -> Figure:
    """Draw each score against ``x``, a point per checkpoint; those of the front in color, with their labels.

    Args:
        x: Score of the classification.
        scores: name -> localization scores, a panel each.
        labels: Name of each point.
        front: Indices of the points on the front.
        title: Title of the figure.
        axis: Label of the x axis.
        uniform: Localization score of a uniform explanation, drawn as a dashed line.
    """
    figure = Figure(figsize=(4.2 * len(scores), 3.8), facecolor="white", layout="constrained")
    figure.suptitle(figure_text(title), x=0.01, ha="left", fontsize=10, weight="bold")
    for ax, (name, y) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        others = [i for i in range(len(x)) if i not in front]
        ax.scatter([x[i] for i in others], [y[i] for i in others], s=16, color=POINT, linewidths=0)
        ax.scatter([x[i] for i in front], [y[i] for i in front], s=26, color=FRONT, linewidths=0, zorder=3)
        for i in front:
            ax.annotate(labels[i], (x[i], y[i]), xytext=(3, 3), textcoords="offset points", fontsize=7, color=FRONT)
        if uniform is not None:
            ax.axhline(uniform, color=MUTED, linestyle="--", linewidth=1, zorder=0)
        ax.set_xlabel(axis, fontsize=9)
        ax.set_ylabel(name, fontsize=9)
        ax.tick_params(labelsize=8)
        ax.grid(color="#e5e7eb", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure
