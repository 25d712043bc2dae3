"""Handwritten digits that come with scikit-learn: real images without a download."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bcos_train.dataset.base import Cache, ImageDataset, check_cache
from bcos_train.dataset.randomness import Stream, permutation

__all__ = ["Digits"]

_GREY_LEVELS = 16


class Digits:
    """1,797 scans of handwritten digits (UCI Optical Recognition, 8×8, 17 grey levels), bright strokes on black.

    The split is stratified and fixed: it depends on ``val_fraction`` alone.

    Args:
        size: side of the square RGB images, in pixels; enlarged from 8 bilinearly.
        val_fraction: share of every class that is kept for validation, in (0, 1).
        cache: "device" keeps all images as one uint8 tensor on each training device, and loads and augments batches
            there, without loading processes. Results are the same bit for bit. The images must fit, be of one size, and
            have no random transform but ``RandomCrop`` and ``RandomHorizontalFlip``.
    """

    name = "digits"

    def __init__(self, size: int = 32, val_fraction: float = 0.2, cache: Cache | None = None) -> None:
        check_cache(cache)
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, not {val_fraction}")
        self.size = size
        self.val_fraction = val_fraction
        self.cache = cache

    @property
    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    @property
    def num_classes(self) -> int:
        return 10

    def prepare(self) -> None:
        """Nothing to do: the images are part of the installed package."""

    def train(self) -> ImageDataset:
        return self._part(validation=False)

    def val(self) -> ImageDataset:
        return self._part(validation=True)

    def _part(self, validation: bool) -> ImageDataset:
        # Only this data set needs scikit-learn, and its import takes a second.
        from sklearn.datasets import load_digits

        data = load_digits()
        labels = data.target.astype(np.int64)
        in_val = np.zeros(len(labels), dtype=bool)
        for digit in range(10):
            of_class = np.flatnonzero(labels == digit)
            shuffled = of_class[permutation(len(of_class), 0, Stream.SPLIT, digit)]
            in_val[shuffled[: max(1, round(self.val_fraction * len(of_class)))]] = True
        chosen = in_val == validation
        grey = np.round(data.images[chosen] * (255 / _GREY_LEVELS)).astype(np.uint8)
        return _GreyImages(grey, labels[chosen], self.size)


class _GreyImages(Dataset[tuple[Image.Image, int]]):
    """Grey images (n, h, w) uint8 as square RGB images."""

    def __init__(self, grey: np.ndarray, labels: np.ndarray, size: int) -> None:
        self._grey = grey
        self._labels = labels
        self._size = size

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self._grey[index])
        enlarged = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
        return enlarged.convert("RGB"), int(self._labels[index])
