"""Energy pointing game (EPG) and pointing game: localization of the evidence for a class on the object.

Axes: N images, H W pixels; ``*`` any leading axes, such as images and their targets. Boxes are (x0, y0, x1, y1) in
pixels from the upper left corner of the image, x to the right, half-open: (0, 0, 1, 1) is the first pixel.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["boxes_to_masks", "check_maps_and_masks", "energy_pointing_scores", "pointing_game_scores"]

Boxes = Sequence[Sequence[float]] | Tensor


def energy_pointing_scores(attributions: Tensor, masks: Tensor) -> Tensor:
    """Compute the share of the positive attribution that lies inside the mask.

    Source: Wang et al., "Score-CAM" (CVPR workshops 2020, arXiv 1910.01279), sec. 4.2, there for boxes. A uniform map
    scores the mask's share of the image, so scores are only comparable on the same images.

    Args:
        attributions: (*, H, W), signed; negative values count as 0.
        masks: (*, H, W) bool, True on the object; see :func:`boxes_to_masks`.

    Returns:
        (*) in [0, 1], float32 or float64. 0 where no value is positive, where a value is NaN or infinite, and where
        the mask is empty; exclude images without an object beforehand if they should not count.

    Raises:
        ValueError: The shapes differ, or the masks aren't bool.
    """
    check_maps_and_masks(attributions, masks)
    positive = attributions.to(torch.promote_types(attributions.dtype, torch.float32)).clamp(min=0)
    # Scaled by the largest value, no sum overflows; NaN now marks the maps without a score.
    positive = positive / positive.amax((-2, -1), keepdim=True)
    total, inside = positive.sum((-2, -1)), torch.where(masks, positive, 0).sum((-2, -1))
    return torch.where(total > 0, inside / total, 0)


def pointing_game_scores(attributions: Tensor, masks: Tensor) -> Tensor:
    """Score 1 (hit) if the largest attribution lies inside the mask, else 0 (miss).

    Source: Zhang et al., "Top-down Neural Attention by Excitation Backprop" (IJCV 2018, arXiv 1608.00507), sec. 4.1,
    without its tolerance of 15 pixels around the object. If several pixels share the largest value, the score is the
    share of them inside the mask: the probability that a random one is a hit.

    Args:
        attributions: (*, H, W), signed.
        masks: (*, H, W) bool.

    Returns:
        (*) in [0, 1], float32 or float64. 0 where no value is positive, where a value is NaN or the largest is
        infinite, and where the mask is empty.

    Raises:
        ValueError: As for :func:`energy_pointing_scores`.
    """
    check_maps_and_masks(attributions, masks)
    peak = attributions.amax((-2, -1), keepdim=True)
    peaks = (attributions == peak) & (peak > 0) & peak.isfinite()
    total, inside = peaks.sum((-2, -1)), (peaks & masks).sum((-2, -1))
    scores = torch.where(total > 0, inside / total, 0)
    return scores.to(torch.promote_types(attributions.dtype, torch.float32))


def boxes_to_masks(boxes: Sequence[Boxes], height: int, width: int, device: torch.device | str | None = None) -> Tensor:
    """Mark the pixels whose centers lie in at least one box of their image.

    Args:
        boxes: For each of N images its boxes (x0, y0, x1, y1) in pixels. Coordinates may be fractions (after resizing)
            and may lie outside the image; an image may have no boxes.
        height, width: Size of the images in pixels.
        device: Device of the masks.

    Returns:
        (N, H, W) bool.

    Raises:
        ValueError: A box is not four numbers with x0 <= x1 and y0 <= y1.
    """
    x, y = torch.arange(width, device=device) + 0.5, torch.arange(height, device=device)[:, None] + 0.5
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool, device=device)
    for mask, image_boxes in zip(masks, boxes, strict=True):
        # On the CPU before the conversion: Apple's GPUs have no float64.
        values = image_boxes.cpu() if isinstance(image_boxes, Tensor) else image_boxes
        corners = torch.as_tensor(values, dtype=torch.float64)
        if corners.numel() == 0:
            continue
        if corners.ndim != 2 or corners.shape[1] != 4 or not (corners[:, :2] <= corners[:, 2:]).all():
            raise ValueError(
                f"boxes of an image must be [(x0, y0, x1, y1), ...] with x0 <= x1 and y0 <= y1, got {corners.tolist()}"
            )
        for x0, y0, x1, y1 in corners.tolist():
            mask |= (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
    return masks


def check_maps_and_masks(attributions: Tensor, masks: Tensor) -> None:
    """Raise a ValueError if maps and masks differ in shape, or the masks aren't bool."""
    if attributions.ndim < 2 or attributions.shape != masks.shape:
        shapes = f"{tuple(attributions.shape)} and {tuple(masks.shape)}"
        raise ValueError(f"attributions and masks must have one shape (*, H, W), got {shapes}")
    if masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool, got {masks.dtype}")
