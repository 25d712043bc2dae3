"""Figures of runs and explanation methods, and the Model Zoo table."""

from bcos_train.report.box_plot import box_plot
from bcos_train.report.gallery import gallery, save_gallery, short_class_name
from bcos_train.report.maps import Panel, Row, map_table
from bcos_train.report.pair_gallery import Explained, pair_gallery
from bcos_train.report.pareto_plot import pareto_plot

__all__ = [
    "Explained",
    "Panel",
    "Row",
    "box_plot",
    "gallery",
    "map_table",
    "pair_gallery",
    "pareto_plot",
    "save_gallery",
    "short_class_name",
]
