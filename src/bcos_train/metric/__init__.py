"""Explanation metrics as pure functions."""

from bcos_train.metric.alignment import cosine_alignment
from bcos_train.metric.bootstrap import Interval, bootstrap_interval
from bcos_train.metric.completeness import completeness_error
from bcos_train.metric.energy_pointing import boxes_to_masks, energy_pointing_scores, pointing_game_scores
from bcos_train.metric.grid_pointing import GridPointing, choose_grids, compose_grids, grid_pointing_scores
from bcos_train.metric.intersection import iou_scores
from bcos_train.metric.pareto import pareto_front
from bcos_train.metric.perturbation import FRACTIONS, area_under_curve, perturbation_curve
from bcos_train.metric.sliding_window import SlidingWindow
from bcos_train.metric.sparsity import gini_index
from bcos_train.metric.stability import noise_stability, shift_stability

__all__ = [
    "FRACTIONS",
    "GridPointing",
    "Interval",
    "SlidingWindow",
    "area_under_curve",
    "bootstrap_interval",
    "boxes_to_masks",
    "choose_grids",
    "completeness_error",
    "compose_grids",
    "cosine_alignment",
    "energy_pointing_scores",
    "gini_index",
    "grid_pointing_scores",
    "iou_scores",
    "noise_stability",
    "pareto_front",
    "perturbation_curve",
    "pointing_game_scores",
    "shift_stability",
]
