"""Handwritten digits from scikit-learn: real images without a download."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bcos_train.dataset.base import Cache, ClassMap, ImageDataset
from bcos_train.dataset.randomness import Stream, permutation
from bcos_train.dataset.split import Split

__all__ = ["Digits"]

#: Largest gray value.
_MAX_GRAY = 16
#: Largest ``size``: a config that somebody sent must not exhaust the memory.
MAX_SIZE = 4096


class Digits:
    """1,797 scans of handwritten digits (UCI Optical Recognition, 8×8, 17 gray levels), bright strokes on black.

    The split is stratified and fixed: it depends only on ``val_fraction``.

    Args:
        size: Side of the square RGB images in pixels, resized bilinearly from 8.
        val_fraction: Fraction of every class in the validation part, in (0, 1).
        cache: Where the images are kept during a run, see :data:`~bcos_train.dataset.base.Cache`.
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.
        shots, val_per_class, split_seed: A few images of each class, see :class:`~bcos_train.dataset.split.Split`.

    Raises:
        ValueError: ``size`` or ``val_fraction`` out of range.
    """

    name = "digits"

    def __init__(
        self,
        size: int = 32,
        val_fraction: float = 0.2,
        cache: Cache | None = None,
        class_map: ClassMap | None = None,
        shots: int | None = None,
        val_per_class: int | None = None,
        split_seed: int = 42,
    ) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"size must lie between 1 and {MAX_SIZE:,} pixels, not {size:,}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, not {val_fraction}")
        self.size = size
        self.val_fraction = val_fraction
        self.cache = cache
        self.class_map = class_map
        self._split = Split(shots, val_per_class, split_seed)

    @property
    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    @property
    def num_classes(self) -> int:
        return 10

    def prepare(self) -> None:
        """Do nothing: the images are part of scikit-learn."""

    def train(self) -> ImageDataset:
        return self._split.train(self._part(validation=False), self.class_names)

    def val(self) -> ImageDataset:
        if self._split.val_per_class is None:
            return self._part(validation=True)
        return self._split.val(self._part(validation=False), self.class_names)

    def _part(self, validation: bool) -> ImageDataset:
        # Only this data set needs scikit-learn, whose import takes a second.
        from sklearn.datasets import load_digits

        data = load_digits()
        labels = data.target.astype(np.int64)
        in_val = np.zeros(len(labels), dtype=bool)
        for digit in range(10):
            indices = np.flatnonzero(labels == digit)
            shuffled = indices[permutation(len(indices), 0, Stream.SPLIT, digit)]
            in_val[shuffled[: max(1, round(self.val_fraction * len(indices)))]] = True
        mask = in_val == validation
        gray = np.round(data.images[mask] * (255 / _MAX_GRAY)).astype(np.uint8)
        return _GrayImages(gray, labels[mask], self.size)


class _GrayImages(Dataset[tuple[Image.Image, int]]):
    """Gray uint8 images (N, H, W) as square RGB images."""

    def __init__(self, gray: np.ndarray, labels: np.ndarray, size: int) -> None:
        self._gray = gray
        self.labels = labels
        self._size = size

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = Image.fromarray(self._gray[index]).resize((self._size, self._size), Image.Resampling.BILINEAR)
        return image.convert("RGB"), int(self.labels[index])
