"""Random flips and crops of whole batches on the device, pixel for pixel those of the CPU's transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bcos_train.dataset.randomness import torch_random_words

__all__ = ["DeviceTransform", "NotCacheable"]

#: Steps without randomness: they run once, on the CPU, when an image is cached.
_FIXED = (v2.Resize, v2.CenterCrop, v2.PILToTensor)
_ALLOWED = "RandomHorizontalFlip and one RandomCrop with black padding, after Resize and CenterCrop"


class NotCacheable(ValueError):
    """A data set or a transform that doesn't go with ``cache="device"``."""


class DeviceTransform:
    """The random part of a transform on batches of cached images.

    A sample's random numbers are those that the transform itself would draw from torch's generator, seeded with the
    sample's seed: the pixels are equal bit for bit.

    Args:
        transform: PIL image -> uint8 (3,H,W): a ``v2.Compose`` of ``Resize``, ``CenterCrop`` and ``PILToTensor`` and,
            after them, any number of ``RandomHorizontalFlip`` and at most one ``RandomCrop`` with black padding.

    Attributes:
        fixed: The part without randomness, PIL image -> uint8 (3,H,W); what is cached.
        border: Black pixels that cached images need on each side, for the crop.

    Raises:
        NotCacheable: for any other transform, naming the first step that isn't possible.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        steps = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]
        fixed: list[Callable[..., object]] = []
        self._random: list[v2.RandomHorizontalFlip | v2.RandomCrop] = []
        for step in steps:
            if isinstance(step, v2.PILToTensor) or (type(step) in _FIXED and not self._random):
                fixed.append(step)
            elif type(step) is v2.RandomHorizontalFlip or (isinstance(step, v2.RandomCrop) and self._allows(step)):
                self._random.append(step)
            else:
                name = f"{type(step).__name__}({step.extra_repr()})" if isinstance(step, v2.Transform) else repr(step)
                raise NotCacheable(
                    f"cache=device: {name} in augmentation.train isn't possible on the device; allowed are "
                    f"{_ALLOWED}, as in augmentation=crop_flip and augmentation=plain"
                )
        self.fixed = v2.Compose(fixed)
        self.border = max([max(step.padding or [0]) for step in self._random if isinstance(step, v2.RandomCrop)] or [0])

    def _allows(self, crop: v2.RandomCrop) -> bool:
        is_first = not any(isinstance(step, v2.RandomCrop) for step in self._random)
        is_black = crop.padding_mode == "constant" and crop.fill == 0 and not crop.pad_if_needed
        return type(crop) is v2.RandomCrop and is_first and is_black

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what becomes of images of this size.

        Raises:
            NotCacheable: for images that are smaller than the crop.
        """
        for step in self._random:
            if isinstance(step, v2.RandomCrop):
                _spare(step, height, width)
                height, width = step.size
        return height, width

    def windows(self, seeds: np.ndarray, height: int, width: int) -> np.ndarray:
        """Where each sample lies in its image of ``height`` x ``width`` pixels.

        Args:
            seeds: int64 (N,), the samples' augmentation seeds.

        Returns:
            int64 (N,3): top, left and direction. Pixel (i, j) of the sample is pixel (top + i, left + direction * j)
            of the image, direction being 1 or, in mirrored ones, -1; outside of the image it is black.
        """
        top, left, direction = (np.full(len(seeds), value, dtype=np.int64) for value in (0, 0, 1))
        words = iter(torch_random_words(seeds, 3 * len(self._random)) if self._random else ())
        for step in self._random:
            if isinstance(step, v2.RandomHorizontalFlip):
                # torch.rand: 24 bits as a float32 in [0, 1)
                uniform = (next(words) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)
                is_flipped = uniform < np.float32(step.p)
                left = np.where(is_flipped, left + direction * (width - 1), left)
                direction = np.where(is_flipped, -direction, direction)
            else:
                pad_left, _, pad_top, _ = step.padding or (0, 0, 0, 0)
                spare_rows, spare_columns = _spare(step, height, width)
                # torch.randint: the remainder; where there is no choice the transform doesn't draw
                row = next(words) % np.uint32(spare_rows + 1) if spare_rows else np.uint32(0)
                column = next(words) % np.uint32(spare_columns + 1) if spare_columns else np.uint32(0)
                top = top + row.astype(np.int64) - pad_top
                left = left + direction * (column.astype(np.int64) - pad_left)
                height, width = step.size
        return np.stack([top, left, direction], axis=1)

    def cut(self, images: Tensor, index: Tensor, windows: Tensor, size: Sequence[int]) -> Tensor:
        """Cut samples out of their images.

        Args:
            images: uint8 (M,H,W,3) with ``border`` black pixels on each side.
            index: int64 (N,), which image.
            windows: int64 (N,3), see :meth:`windows`.
            size: height and width of the samples.

        Returns:
            uint8 (N,3,h,w) in the channels_last memory format.
        """
        if not self._random:
            return images[index].permute(0, 3, 1, 2)
        top, left, direction = windows[:, :, None].unbind(1)
        rows = top + torch.arange(self.border, self.border + size[0], device=images.device)
        columns = left + self.border + direction * torch.arange(size[1], device=images.device)
        return images[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _spare(crop: v2.RandomCrop, height: int, width: int) -> tuple[int, int]:
    """Rows and columns that the padded image has more than the crop."""
    left, right, top, bottom = crop.padding or (0, 0, 0, 0)
    rows, columns = height + top + bottom - crop.size[0], width + left + right - crop.size[1]
    if rows < 0 or columns < 0:
        raise NotCacheable(
            f"cache=device: RandomCrop of {crop.size[0]}×{crop.size[1]} is larger than the padded images, "
            f"{height + top + bottom}×{width + left + right}"
        )
    return rows, columns
