"""Random flips and crops of whole batches on the device, bit-identical to the transforms on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from bcos_train.dataset.randomness import torch_random_words

__all__ = ["DeviceTransform", "NotCacheable"]

#: Deterministic steps: they run once, on the CPU, when an image is cached.
_DETERMINISTIC = (v2.Resize, v2.CenterCrop, v2.PILToTensor)
_ALLOWED = "RandomHorizontalFlip and one RandomCrop with black padding, after Resize and CenterCrop"


class NotCacheable(ValueError):
    """A data set or a transform is incompatible with ``cache="device"``."""


class DeviceTransform:
    """The random part of a transform on batches of cached images.

    The random numbers of a sample are those that the transform would draw from torch's generator after seeding it with
    the sample's seed: the pixels are bit-identical.

    Args:
        transform: PIL image -> uint8 ``(3, H, W)``: a ``v2.Compose`` of ``Resize``, ``CenterCrop`` and ``PILToTensor``
            and, after them, any number of ``RandomHorizontalFlip`` and at most one ``RandomCrop`` with black padding.

    Attributes:
        deterministic: The part whose output is cached, PIL image -> uint8 ``(3, H, W)``.
        border: Width in pixels of the black border that cached images need on each side, for the crop.

    Raises:
        NotCacheable: The transform contains another step.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        steps = list(transform.transforms) if isinstance(transform, v2.Compose) else [transform]
        deterministic: list[Callable[..., object]] = []
        self._random: list[v2.RandomHorizontalFlip | v2.RandomCrop] = []
        for step in steps:
            if isinstance(step, v2.PILToTensor) or (type(step) in _DETERMINISTIC and not self._random):
                deterministic.append(step)
            elif type(step) is v2.RandomHorizontalFlip or (isinstance(step, v2.RandomCrop) and self._supports(step)):
                self._random.append(step)
            else:
                name = f"{type(step).__name__}({step.extra_repr()})" if isinstance(step, v2.Transform) else repr(step)
                raise NotCacheable(
                    f"cache=device: {name} in augmentation.train isn't possible on the device; allowed are "
                    f"{_ALLOWED}, as in augmentation=crop_flip and augmentation=plain"
                )
        self.deterministic = v2.Compose(deterministic)
        self.border = max([max(step.padding or [0]) for step in self._random if isinstance(step, v2.RandomCrop)] or [0])

    def _supports(self, crop: v2.RandomCrop) -> bool:
        is_first = not any(isinstance(step, v2.RandomCrop) for step in self._random)
        is_black = crop.padding_mode == "constant" and crop.fill == 0 and not crop.pad_if_needed
        return type(crop) is v2.RandomCrop and is_first and is_black

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of transformed images of this size.

        Raises:
            NotCacheable: The images are smaller than the crop.
        """
        for step in self._random:
            if isinstance(step, v2.RandomCrop):
                _margins(step, height, width)
                height, width = step.size
        return height, width

    def windows(self, seeds: np.ndarray, height: int, width: int) -> np.ndarray:
        """Draw the window of each sample in its image of ``height`` × ``width`` pixels.

        Args:
            seeds: ``(N,)``, int64, augmentation seeds of the samples.

        Returns:
            int64 ``(N, 3)``: top, left and direction. Pixel (i, j) of the sample is pixel (top + i, left + direction *
            j) of the image, or black outside of the image; the direction is 1, or -1 for flipped samples.
        """
        top, left, direction = (np.full(len(seeds), value, dtype=np.int64) for value in (0, 0, 1))
        words = iter(torch_random_words(seeds, 3 * len(self._random)) if self._random else ())
        for step in self._random:
            if isinstance(step, v2.RandomHorizontalFlip):
                # As torch.rand: 24 bits as a float32 in [0, 1).
                uniform = (next(words) & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)
                is_flipped = uniform < np.float32(step.p)
                left = np.where(is_flipped, left + direction * (width - 1), left)
                direction = np.where(is_flipped, -direction, direction)
            else:
                pad_left, _, pad_top, _ = step.padding or (0, 0, 0, 0)
                rows, columns = _margins(step, height, width)
                # As torch.randint: the remainder. Without a margin the transform doesn't draw a number.
                row = next(words) % np.uint32(rows + 1) if rows else np.uint32(0)
                column = next(words) % np.uint32(columns + 1) if columns else np.uint32(0)
                top = top + row.astype(np.int64) - pad_top
                left = left + direction * (column.astype(np.int64) - pad_left)
                height, width = step.size
        return np.stack([top, left, direction], axis=1)

    def crop(self, images: Tensor, index: Tensor, windows: Tensor, size: Sequence[int]) -> Tensor:
        """Crop samples from their images.

        Args:
            images: ``(M, H, W, 3)``, uint8, with a black border of ``border`` pixels on each side.
            index: ``(N,)``, int64, image of each sample.
            windows: ``(N, 3)``, int64, see :meth:`windows`.
            size: Height h and width w of the samples.

        Returns:
            uint8 ``(N, 3, h, w)`` in the channels_last memory format.
        """
        if not self._random:
            return images[index].permute(0, 3, 1, 2)
        top, left, direction = windows[:, :, None].unbind(1)
        rows = top + torch.arange(self.border, self.border + size[0], device=images.device)
        columns = left + self.border + direction * torch.arange(size[1], device=images.device)
        return images[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _margins(crop: v2.RandomCrop, height: int, width: int) -> tuple[int, int]:
    """Return by how many rows and columns the padded image is larger than the crop."""
    left, right, top, bottom = crop.padding or (0, 0, 0, 0)
    rows, columns = height + top + bottom - crop.size[0], width + left + right - crop.size[1]
    if rows < 0 or columns < 0:
        raise NotCacheable(
            f"cache=device: RandomCrop of {crop.size[0]}×{crop.size[1]} is larger than the padded images, "
            f"{height + top + bottom}×{width + left + right}"
        )
    return rows, columns
