"""Completeness: how far the contributions are from adding up to the logit."""

import torch
from torch import Tensor

__all__ = ["completeness_error"]


def completeness_error(logit: Tensor, contribution_sum: Tensor, constant: Tensor | float) -> Tensor:
    """|contribution_sum + constant - logit| / |logit|; zero for an exact explanation, up to rounding.

    It finds activations, norms and attention that are not frozen and constants that are not counted. It cannot find a
    B-cos layer that is not: such a layer is homogeneous of degree one, so its gradient times its input is its output
    (Euler) in either mode.

    Args:
        logit: any shape (*).
        contribution_sum: (*), the sum of the contribution map over its pixels.
        constant: (*) or a number, the part of the logit that is not the input's
            (:func:`bcos_train.explanation.constant_term`; for networks without other biases the logit bias).

    Returns:
        (*), without unit; where the logit is 0 the residual itself, in units of the logit; NaN where an argument is:
        a map that can't be added up is no explanation, and is not to be taken for an exact one.

    Raises:
        ValueError: the shapes differ.
    """
    shapes = {tuple(t.shape) for t in (logit, contribution_sum, constant) if isinstance(t, Tensor)}
    if len(shapes) > 1:
        raise ValueError(f"logit, contribution_sum and constant must have one shape, got {sorted(shapes)}")
    residual = (contribution_sum + constant - logit).abs()
    return residual / torch.where(logit == 0, 1, logit.abs())
