"""Figures of explanations in a table: a row per image or grid, a column per method.

Axes: H, W pixels.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from bcos_train.explanation import plot_contribution_map
from bcos_train.report.gallery import FRAME, LEGEND, MUTED, SHARP, figure_text

__all__ = ["Panel", "Row", "map_table"]

# Lengths in inches.
PICTURE = 1.45
GAP = (0.08, 0.1)  # across and down
MARGIN, HEAD, COLUMN_HEAD, NOTE, FOOTER, LABEL = 0.2, 0.36, 0.24, 0.17, 0.55, 0.3
CELL = "#16a34a"  # the frame of a cell
#: Pixels beyond this percentile of a map's magnitudes have the full color.
PERCENTILE = 99.5


@dataclass(frozen=True)
class Panel:
    """One picture of the table.

    Attributes:
        values: RGB picture (H, W, 3) in [0, 1], signed map (H, W), or ``None`` if it is missing.
        note: Line below the picture, or the reason why it is missing.
        box: Left, top, width and height in pixels of a frame drawn in the picture.
        n_cells: Number of cells per side of a grid, separated by thin lines.
    """

    values: Tensor | None
    note: str = ""
    box: tuple[float, float, float, float] | None = None
    n_cells: int = 1


@dataclass(frozen=True)
class Row:
    """A row of the table: a label and a panel per column."""

    label: str
    panels: Sequence[Panel]


def map_table(columns: Sequence[str], rows: Sequence[Row], title: str) -> Figure:
    """Draw pictures and signed maps, each map with its own symmetric scale.

    Red is evidence for the class, blue against it. Maps of different methods have different units, so each is scaled by
    its own 99.5th percentile. The figure is independent of pyplot.

    Args:
        columns: Column titles.
        rows: At least one row, each with a panel per column.
        title: Title of the figure.

    Raises:
        ValueError: There are no rows, or a row has another length.
    """
    if not rows or any(len(row.panels) != len(columns) for row in rows):
        raise ValueError(f"at least one row with {len(columns)} panels each, got {[len(row.panels) for row in rows]}")
    shapes = [panel.values.shape for row in rows for panel in row.panels if panel.values is not None]
    height = PICTURE * max((shape[0] / shape[1] for shape in shapes), default=1.0)
    has_notes = any(panel.note for row in rows for panel in row.panels)
    has_labels = any(row.label for row in rows)
    left = MARGIN + (LABEL if has_labels else 0)
    step = height + GAP[1] + (NOTE if has_notes else 0)
    page = (
        left + len(columns) * PICTURE + (len(columns) - 1) * GAP[0] + MARGIN,
        MARGIN + HEAD + COLUMN_HEAD + len(rows) * step + FOOTER,
    )
    figure = Figure(figsize=page, facecolor="white")
    figure.text(MARGIN / page[0], 1 - MARGIN / page[1], figure_text(title), fontsize=10.5, weight="bold", va="top")
    for r, row in enumerate(rows):
        top = MARGIN + HEAD + COLUMN_HEAD + r * step
        middle = 1 - (top + height / 2) / page[1]
        figure.text(
            (left - 0.09) / page[0], middle, figure_text(row.label), rotation=90, ha="right", va="center", fontsize=8
        )
        for c, (name, panel) in enumerate(zip(columns, row.panels, strict=True)):
            x = left + c * (PICTURE + GAP[0])
            bounds = (x / page[0], 1 - (top + height) / page[1], PICTURE / page[0], height / page[1])
            ax = figure.add_axes(bounds)
            _draw(ax, panel)
            if r == 0:
                ax.set_title(figure_text(name), fontsize=9, pad=4)
    draw_scale(figure, page)
    return figure


def _draw(ax: Axes, panel: Panel) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color=FRAME, linewidth=0.6)
    if panel.values is None:
        reason = panel.note or "none"
        ax.text(0.5, 0.5, _wrapped(reason), transform=ax.transAxes, ha="center", va="center", fontsize=7, color=MUTED)
        return
    values = torch.nan_to_num(panel.values.detach().cpu().float(), 0.0, 0.0, 0.0)
    if values.ndim == 3:
        ax.imshow(values.clamp(0, 1).numpy())
    else:
        plot_contribution_map(values, ax, percentile=PERCENTILE)
    ax.images[0].set_interpolation("nearest" if len(values) <= SHARP else "antialiased")
    height, width = values.shape[:2]
    for k in range(1, panel.n_cells):
        ax.axvline(k * width / panel.n_cells - 0.5, color=FRAME, linewidth=0.6)
        ax.axhline(k * height / panel.n_cells - 0.5, color=FRAME, linewidth=0.6)
    if panel.box is not None:
        x, y, box_width, box_height = panel.box
        style = {"fill": False, "edgecolor": CELL, "linewidth": 1.8, "zorder": 3}  # above the lines of the cells
        ax.add_patch(Rectangle((x - 0.5, y - 0.5), box_width, box_height, **style))  # type: ignore[arg-type]
    ax.set_xlabel(figure_text(panel.note), fontsize=7.5, labelpad=2.5, color=MUTED)


def _wrapped(text: str, width: int = 24, lines: int = 6) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def draw_scale(figure: Figure, page: tuple[float, float], legend: str = LEGEND) -> None:
    """Draw the color bar of signed maps without numbers at the foot of a page of (width, height) inches."""
    width = min(2.2, page[0] - 1)
    bounds = ((page[0] - width) / 2 / page[0], (FOOTER - 0.2) / page[1], width / page[0], 0.08 / page[1])
    bar = figure.colorbar(
        ScalarMappable(Normalize(-1, 1), cmap="bwr"), cax=figure.add_axes(bounds), orientation="horizontal"
    )
    bar.set_ticks([])
    bar.outline.set(edgecolor=FRAME, linewidth=0.6)
    bar.set_label(f"{legend}; each map in its own scale", fontsize=7.5, color=MUTED, labelpad=3)
