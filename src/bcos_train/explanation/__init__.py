"""Explanation mode, dynamic linear weights W(x), contribution maps and colour images."""

from bcos_train.explanation.dynamic_linear import Explanation, constant_term, explain
from bcos_train.explanation.image import color_explanation, gradient_to_image, official_dict, plot_contribution_map
from bcos_train.explanation.mode import evaluating, explanation_mode, is_explainable

__all__ = [
    "Explanation",
    "color_explanation",
    "constant_term",
    "evaluating",
    "explain",
    "explanation_mode",
    "gradient_to_image",
    "is_explainable",
    "official_dict",
    "plot_contribution_map",
]
