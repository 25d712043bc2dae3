"""Explanation mode, dynamic linear weights W(x), contribution maps and color images."""

from bcos_train.explanation.dynamic_linear import Explanation, constant_term, dynamic_linear_weights, explain
from bcos_train.explanation.image import color_explanation, gradient_to_image, official_dict, plot_contribution_map
from bcos_train.explanation.mode import evaluating, explanation_graph, explanation_mode, is_explainable
from bcos_train.explanation.precision import allow_tf32, without_tf32
from bcos_train.explanation.trainable import Attribution, attribution_maps, find_layer

__all__ = [
    "Attribution",
    "Explanation",
    "allow_tf32",
    "attribution_maps",
    "color_explanation",
    "constant_term",
    "dynamic_linear_weights",
    "evaluating",
    "explain",
    "explanation_graph",
    "explanation_mode",
    "find_layer",
    "gradient_to_image",
    "is_explainable",
    "official_dict",
    "plot_contribution_map",
    "without_tf32",
]
