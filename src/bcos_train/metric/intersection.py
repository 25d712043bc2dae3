"""Intersection over union (IoU) of the strongest evidence for a class and the object.

Axes: H W pixels; ``*`` any leading axes, such as images and their targets.
"""

import torch
from torch import Tensor

from bcos_train.metric.energy_pointing import check_maps_and_masks

__all__ = ["iou_scores"]

#: Range of the positive part below which a map is constant.
MIN_RANGE = 1e-7


def iou_scores(attributions: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Compute the intersection over union of the mask and the pixels with a high attribution.

    The positive part of a map is scaled from its minimum and maximum to 0 and 1; pixels above the threshold count. All
    pixels of a positive constant map do, so that it scores the mask's share of the image. Source: Rao et al., "Studying
    How to Efficiently and Effectively Guide Models with Explanations" (ICCV 2023, arXiv 2303.11932), sec. 4.

    Args:
        attributions: (*, H, W), signed; negative values count as 0.
        masks: (*, H, W) bool, True on the object; see :func:`~bcos_train.metric.boxes_to_masks`.
        threshold: Pixels count if their scaled value is larger.

    Returns:
        (*) in [0, 1], float32 or float64. 0 where no value is positive, where a value is NaN or infinite, and where
        the mask is empty.

    Raises:
        ValueError: The shapes differ, or the masks aren't bool.
    """
    check_maps_and_masks(attributions, masks)
    positive = attributions.to(torch.promote_types(attributions.dtype, torch.float32)).clamp(min=0)
    low, high = positive.amin((-2, -1), keepdim=True), positive.amax((-2, -1), keepdim=True)
    is_constant = high - low < MIN_RANGE
    scaled = torch.where(is_constant, positive / high, (positive - low) / (high - low))
    chosen = scaled > threshold  # False for NaN
    chosen &= torch.isfinite(attributions).all(-1, keepdim=True).all(-2, keepdim=True)
    union, intersection = (chosen | masks).sum((-2, -1)), (chosen & masks).sum((-2, -1))
    return torch.where(union > 0, intersection / union, 0).to(positive.dtype)
