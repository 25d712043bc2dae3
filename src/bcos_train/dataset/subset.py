"""Look through subsets at the data set that they were drawn from."""

from __future__ import annotations

import numpy as np
from torch.utils.data import Subset

from bcos_train.dataset.base import ImageDataset

__all__ = ["labels_of", "path_of", "whole_dataset"]


def whole_dataset(images: ImageDataset) -> tuple[ImageDataset, np.ndarray]:
    """Return the whole data set of a subset, and the subset's indices in it, int64 (M,)."""
    indices = np.arange(len(images))  # type: ignore[arg-type]  # map-style data sets have a length
    while isinstance(images, Subset):
        indices = np.asarray(images.indices, dtype=np.int64)[indices]
        images = images.dataset
    return images, indices


def labels_of(images: ImageDataset) -> np.ndarray:
    """Return the labels of all images without reading them: int64 ``(N,)``, or multi-hot ``(N, K)``."""
    if isinstance(images, Subset):
        return labels_of(images.dataset)[images.indices]
    # torchvision calls them targets.
    return np.asarray(images.labels if hasattr(images, "labels") else images.targets)  # type: ignore[attr-defined]


def path_of(images: ImageDataset, index: int) -> str | None:
    """Return the file of an image, or its shard and key; None if it is neither."""
    if isinstance(images, Subset):
        return path_of(images.dataset, images.indices[index])
    return str(images.path(index)) if hasattr(images, "path") else None
