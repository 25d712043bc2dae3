"""Which part of an image a random crop shows, for maps that were computed once for the whole image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

__all__ = ["check_has_window", "draw_window", "whole_image_view"]

#: Steps that show a window of the image, with unchanged colors.
_HAS_WINDOW = (v2.PILToTensor, v2.RandomCrop, v2.RandomHorizontalFlip, v2.RandomResizedCrop, v2.Resize)
_EVAL_STEPS = (v2.CenterCrop, v2.PILToTensor, v2.Resize)

Transform = Callable[[Image.Image], Tensor]


def check_has_window(transform: Transform, key: str) -> None:
    """Check that a transform only crops, flips and resizes.

    Args:
        key: Config key of the transform, for the message.

    Raises:
        ValueError: It does something else.
    """
    for step in _steps(transform):
        if type(step) not in _HAS_WINDOW:
            names = ", ".join(kind.__name__ for kind in _HAS_WINDOW)
            raise ValueError(
                f"{key}: after {getattr(step, '__name__', type(step).__name__)} a map of the unchanged image no longer "
                f"fits the image; possible are {names}, as in augmentation=plain, crop_flip and imagenet"
            )
        if isinstance(step, v2.RandomCrop) and (step.padding_mode != "constant" or step.pad_if_needed):
            raise ValueError(f"{key}: RandomCrop can only pad with a constant: padding_mode={step.padding_mode}")


def draw_window(transform: Transform, width: int, height: int) -> Tensor:
    """Draw the window that a transform shows of an image of this size, without computing pixels.

    It takes the same random numbers from torch's generator as the transform: seed the generator in the same way.

    Args:
        transform: Passes :func:`check_has_window`.

    Returns:
        float32 ``(4,)``: x0, y0, x1, y1 in relative coordinates of the whole image, which spans [0, 1]. The output's
        left edge is at x0 and its right edge at x1, so x0 > x1 if it is flipped. Padding lies outside of [0, 1].
    """
    left, top, right, bottom = 0.0, 0.0, 1.0, 1.0
    for step in _steps(transform):
        frame = torch.empty(1, height, width, device="meta")  # an image without pixels
        if isinstance(step, v2.RandomHorizontalFlip):
            if torch.rand(1) < step.p:
                left, right = right, left
        elif isinstance(step, (v2.RandomCrop, v2.RandomResizedCrop)):
            crop = step.make_params([frame])
            pad_left, pad_top = crop.get("padding", (0, 0))[:2]
            x, y = (crop["left"] - pad_left) / width, (crop["top"] - pad_top) / height
            span_x, span_y = right - left, bottom - top
            left, right = left + span_x * x, left + span_x * (x + crop["width"] / width)
            top, bottom = top + span_y * y, top + span_y * (y + crop["height"] / height)
            height, width = step.size
        elif isinstance(step, v2.Resize):
            height, width = step(frame).shape[1:]
    return torch.tensor([left, top, right, bottom])


def whole_image_view(transform: Transform, key: str = "augmentation.eval") -> v2.Compose:
    """Return the view of an evaluation transform, but of the whole image: a map of it has no part missing.

    A center crop cuts off the margin, which training crops show. So the whole image is resized to the size of the crop
    instead, regardless of its aspect ratio; random resized crops change the ratio, too. Without a center crop the
    transform is unchanged.

    Args:
        transform: Resize, CenterCrop and PILToTensor.
        key: Config key of the transform, for the message.

    Raises:
        ValueError: The transform contains another step.
    """
    steps = _steps(transform)
    for step in steps:
        if type(step) not in _EVAL_STEPS:
            name = getattr(step, "__name__", type(step).__name__)
            raise ValueError(f"{key}: {name} has no view of the whole image; possible are Resize and CenterCrop")
    crops = [step for step in steps if isinstance(step, v2.CenterCrop)]
    if not crops:
        return v2.Compose(steps)
    resizes = [step for step in steps if isinstance(step, v2.Resize)]
    options = {"interpolation": resizes[-1].interpolation} if resizes else {}
    return v2.Compose([v2.Resize(tuple(crops[-1].size), **options), v2.PILToTensor()])


def _steps(transform: Transform) -> list[Callable[..., object]]:
    return list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]
