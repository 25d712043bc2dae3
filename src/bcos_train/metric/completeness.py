"""Completeness: distance between the sum of the contributions and the logit."""

import torch
from torch import Tensor

__all__ = ["completeness_error"]


def completeness_error(logit: Tensor, contribution_sum: Tensor, constant: Tensor | float) -> Tensor:
    """Compute |contribution_sum + constant - logit| / |logit|, which is zero for an exact explanation, up to rounding.

    The error detects activations, norms and attention that are not detached, and constants that are missing. It cannot
    detect a B-cos layer that is not detached: the layer is homogeneous of degree one, so its gradient times its input
    is its output in either mode (Euler).

    Args:
        logit: (*), any shape.
        contribution_sum: (*), the sum of the contribution map over its pixels.
        constant: (*) or a number: the part of the logit that doesn't depend on the input
            (:func:`bcos_train.explanation.constant_term`; the logit bias for networks without other biases).

    Returns:
        (*), dimensionless. Where the logit is 0, the absolute residual in units of the logit. NaN where an argument is
        NaN, so that a broken map is not mistaken for an exact explanation.

    Raises:
        ValueError: The shapes differ.
    """
    shapes = {tuple(t.shape) for t in (logit, contribution_sum, constant) if isinstance(t, Tensor)}
    if len(shapes) > 1:
        raise ValueError(f"logit, contribution_sum and constant must have one shape, got {sorted(shapes)}")
    residual = (contribution_sum + constant - logit).abs()
    return residual / torch.where(logit == 0, 1, logit.abs())
