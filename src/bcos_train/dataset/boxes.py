"""Bounding boxes: int64 ``(M, 5)``, rows ``[class, x0, y0, x1, y1]``, half-open, in pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

__all__ = ["check_boxes", "check_carries_boxes", "pad_boxes", "transform_with_boxes"]

#: Transforms that move boxes with the image, or leave both where they are.
_CARRIES_BOXES = (
    v2.CenterCrop,
    v2.PILToTensor,
    v2.RandomAffine,
    v2.RandomCrop,
    v2.RandomHorizontalFlip,
    v2.RandomResizedCrop,
    v2.Resize,
)


def check_boxes(boxes: np.ndarray, width: int, height: int, file: object) -> None:
    """Check the boxes of an image.

    Args:
        boxes: ``(M, 5)``.
        width, height: Size of the image in pixels.
        file: Where the boxes are from, for the message.

    Raises:
        ValueError: A box is empty, or not entirely inside the image.
    """
    x0, y0, x1, y1 = boxes[:, 1:].T
    for problem, is_bad in (
        ("is empty", (x0 >= x1) | (y0 >= y1)),
        (f"is not inside the image of {width}×{height} pixels", (x0 < 0) | (y0 < 0) | (x1 > width) | (y1 > height)),
    ):
        if is_bad.any():
            row = int(is_bad.argmax())
            corners = ", ".join(map(str, boxes[row, 1:].tolist()))
            raise ValueError(f"{file}: box {row + 1} of {len(boxes)} (x0, y0, x1, y1 = {corners}) {problem}")


def check_carries_boxes(transform: Callable[..., Tensor], key: str) -> None:
    """Check that a transform moves boxes with the image.

    Args:
        key: Config key of the transform, for the message.

    Raises:
        ValueError: It contains a step that doesn't.
    """
    for step in transform.transforms if isinstance(transform, v2.Compose) else [transform]:
        if type(step) not in _CARRIES_BOXES:
            names = ", ".join(kind.__name__ for kind in _CARRIES_BOXES)
            raise ValueError(
                f"{key}: {getattr(step, '__name__', type(step).__name__)} doesn't move the boxes of the data set with "
                f"the image; possible are {names}, as in augmentation=plain, crop_flip and imagenet"
            )


def transform_with_boxes(transform: Callable[..., Any], image: Image.Image, boxes: np.ndarray) -> tuple[Tensor, Tensor]:
    """Apply a transform of torchvision to an image and its boxes.

    The image is bit-identical to ``transform(image)``, with the same random numbers. Coordinates are rounded to whole
    pixels at the end. What is cropped away is clipped; boxes of which nothing remains are dropped.

    Args:
        transform: Passes :func:`check_carries_boxes`.
        boxes: int64 ``(M, 5)``, in pixels of ``image``.

    Returns:
        The image, and its boxes int64 ``(M', 5)``, M' ≤ M.
    """
    width, height = image.size
    corners = tv_tensors.BoundingBoxes(  # float64, or each step would truncate them
        torch.from_numpy(boxes[:, 1:].astype(np.float64)),
        format=tv_tensors.BoundingBoxFormat.XYXY,
        canvas_size=(height, width),
    )
    transformed, moved = transform(image, corners)
    height, width = transformed.shape[-2:]
    limits = torch.tensor([width, height, width, height])
    corners_after = moved.as_subclass(Tensor).add(0.5).floor().long().clamp(min=0).minimum(limits)
    is_visible = (corners_after[:, :2] < corners_after[:, 2:]).all(1)
    return transformed, torch.cat([torch.from_numpy(boxes[:, :1]), corners_after], 1)[is_visible]


def pad_boxes(boxes: Sequence[Tensor]) -> Tensor:
    """Stack the boxes of a batch.

    Args:
        boxes: N tensors int64 ``(M_n, 5)``.

    Returns:
        int64 ``(N, M, 5)`` with M = max(1, M_1, …, M_N); rows of class -1 are padding, with corners 0.
    """
    padded = torch.zeros(len(boxes), max(1, *map(len, boxes)), 5, dtype=torch.int64)
    padded[:, :, 0] = -1
    for n, rows in enumerate(boxes):
        padded[n, : len(rows)] = rows
    return padded
