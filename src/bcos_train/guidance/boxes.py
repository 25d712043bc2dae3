"""Boxes of a batch: the class to explain in each image, and the mask of its boxes.

Axes: N images, M boxes, K classes, H W pixels. Boxes are rows (class, x0, y0, x1, y1) in pixels, half-open: columns
x0 <= x < x1 and rows y0 <= y < y1. Class -1 marks rows that only fill up the tensor. Nothing here waits for the device.
"""

import torch
from torch import Tensor

__all__ = ["class_masks", "positive_classes"]


def positive_classes(labels: Tensor, words: Tensor) -> Tensor:
    """Draw one of each image's positive classes, all with the same probability.

    Args:
        labels: (N,) class indices, which are returned; or (N, K), positive where more than 0.
        words: (N,) random integers in [0, 2^63).

    Returns:
        (N,) int64; -1 for an image without positive ones.
    """
    if labels.ndim == 1:
        return labels
    is_positive = labels > 0
    number = words % is_positive.sum(1).clamp(min=1)
    is_drawn = is_positive & (is_positive.cumsum(1) == number[:, None] + 1)
    return torch.where(is_drawn.any(1), is_drawn.to(torch.uint8).argmax(1), -1)


def class_masks(boxes: Tensor, classes: Tensor, height: int, width: int, dilation: float = 0.0) -> Tensor:
    """Mark the pixels inside the boxes of one class per image.

    Args:
        boxes: (N, M, 5) integers.
        classes: (N,) integers; -1: no class.
        height, width: Size of the images in pixels.
        dilation: Each side of a box moves outwards by ``int(dilation * width)`` or ``int(dilation * height)`` of the
            box, up to the border of the image.

    Returns:
        (N, H, W) bool; all False for an image without boxes of its class.
    """
    x, y = torch.arange(width, device=boxes.device), torch.arange(height, device=boxes.device)
    is_class = (boxes[..., 0] == classes[:, None]) & (classes[:, None] >= 0)
    columns = _inside(x, boxes[..., 1], boxes[..., 3], dilation)
    rows = _inside(y, boxes[..., 2], boxes[..., 4], dilation) & is_class[..., None]
    # As a product of matrices: the masks of single boxes would take M times the memory.
    return torch.bmm(rows.float().mT, columns.float()) > 0


def _inside(positions: Tensor, start: Tensor, stop: Tensor, dilation: float) -> Tensor:
    """Return (N, M, positions): True from ``start`` to before ``stop`` (N, M), after the dilation."""
    # As int() rounds a Python float; Apple's GPUs have no float64.
    dtype = torch.float32 if start.device.type == "mps" else torch.float64
    margin = ((stop - start).to(dtype) * dilation).long()
    return (start - margin)[..., None].le(positions) & (stop + margin)[..., None].gt(positions)
