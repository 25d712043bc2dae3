"""A small data set with boxes, several labels and groups."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bcos_train.dataset.base import Annotations

#: Side of the images.
SIZE = 24


class AnnotatedImages(Dataset):
    """Black images with a white rectangle per box; image i has i % 3 boxes."""

    def __init__(self, n: int = 12, num_classes: int = 3, is_multi_label: bool = True) -> None:
        self.n, self.num_classes, self.is_multi_label = n, num_classes, is_multi_label

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Image.Image, object, Annotations]:
        rng = np.random.default_rng(index)
        pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        boxes = np.zeros((index % 3, 5), dtype=np.int64)
        for row in boxes:
            x0, y0 = rng.integers(0, SIZE - 10, 2)
            width, height = rng.integers(5, 11, 2)
            row[:] = rng.integers(self.num_classes), x0, y0, x0 + width, y0 + height
            pixels[y0 : y0 + height, x0 : x0 + width] = 255
        label = np.zeros(self.num_classes, dtype=np.float32)
        label[boxes[:, 0]] = 1
        return Image.fromarray(pixels), label if self.is_multi_label else index % 3, Annotations(boxes, index % 2)


class AnnotatedSource:
    """Twelve training and seven validation images in three classes and two groups."""

    name = "annotated"
    num_classes = 3
    has_boxes = True

    def __init__(self, is_multi_label: bool = True, cache: str | None = None) -> None:
        self.is_multi_label, self.cache = is_multi_label, cache
        self.class_names, self.group_names = ["a", "b", "c"], ["even", "odd"]

    def prepare(self) -> None:
        pass

    def train(self) -> AnnotatedImages:
        return AnnotatedImages(12, is_multi_label=self.is_multi_label)

    def val(self) -> AnnotatedImages:
        return AnnotatedImages(7, is_multi_label=self.is_multi_label)
