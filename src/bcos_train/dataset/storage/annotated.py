"""Image files with labels, boxes and groups from an index that the data set has read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bcos_train.dataset.base import Annotations, Label
from bcos_train.dataset.image import read_image
from bcos_train.dataset.storage.folder import shorten

__all__ = ["AnnotatedFiles", "multi_hot"]


class AnnotatedFiles(Dataset[tuple[Image.Image, Label, Annotations]]):
    """The images ``folder/<name>``, in the order of ``names``.

    Args:
        labels: Class indices int64 ``(N,)``, or multi-hot bool ``(N, K)``.
        boxes: Of each image, int64 ``(M_n, 5)``, see :class:`~bcos_train.dataset.base.Annotations`; ``None``: no boxes.
        groups: int64 ``(N,)``; ``None``: no groups.

    Raises:
        ValueError: An image file is missing.
        UnreadableImage: On access: an image can't be read, or has no defined conversion to RGB.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        labels: np.ndarray,
        boxes: Sequence[np.ndarray] | None = None,
        groups: np.ndarray | None = None,
    ) -> None:
        if missing := [name for name in names if not os.path.exists(os.path.join(folder, name))]:
            raise ValueError(f"{folder} lacks images of the index: {shorten(missing)}")
        # Arrays instead of lists: see FolderImages.
        self._names = np.array([os.fsencode(name) for name in names])
        self._folder = str(folder)
        self._boxes = None if boxes is None else np.concatenate([np.zeros((0, 5), dtype=np.int64), *boxes])
        self._ends = None if boxes is None else np.cumsum([0, *map(len, boxes)])
        self._groups = groups
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Return a hash of the names, labels, boxes and groups of all images."""
        content = hashlib.sha256(self._names.tobytes())
        for array in (self.labels, self._boxes, self._ends, self._groups):
            content.update(b"" if array is None else array.tobytes())
        return content.hexdigest()

    def path(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(bytes(self._names[index])))

    def __getitem__(self, index: int) -> tuple[Image.Image, Label, Annotations]:
        image = read_image(self.path(index))
        label: Label = self.labels[index].astype(np.float32) if self.labels.ndim == 2 else int(self.labels[index])
        boxes = None
        if self._boxes is not None and self._ends is not None:
            boxes = self._boxes[self._ends[index] : self._ends[index + 1]]
        return image, label, Annotations(boxes, None if self._groups is None else int(self._groups[index]))


def multi_hot(boxes: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """Return the classes of each image's boxes, bool ``(N, num_classes)``."""
    labels = np.zeros((len(boxes), num_classes), dtype=bool)
    for row, rows in zip(labels, boxes, strict=True):
        row[rows[:, 0]] = True
    return labels
