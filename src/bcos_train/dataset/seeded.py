"""Samples whose augmentation depends only on their key, and their collation to batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bcos_train.dataset.base import ImageDataset
from bcos_train.dataset.batch import Batch
from bcos_train.dataset.randomness import isolated_rng, seed_generators
from bcos_train.dataset.sampler import SampleKey

__all__ = ["ImageSizeMismatch", "Sample", "SeededDataset", "Transform", "collate"]

Transform = Callable[[Image.Image], Tensor]
"""PIL image -> uint8 (3, H, W)."""

Sample = tuple[Tensor, int, int]
"""Image uint8 (3, H, W), label, index in the data set."""


class SeededDataset(Dataset[Sample]):
    """A data set with its transform applied.

    The seed of a key ``(index, seed)`` is set before its sample is transformed: the result is the same in any process.
    A plain index is for deterministic transforms. The state of the random generators stays unchanged.
    """

    def __init__(self, dataset: ImageDataset, transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style data sets have a length

    def __getitem__(self, key: int | SampleKey) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> list[Sample]:
        """Return the samples of a batch; used by DataLoader.

        Saving and restoring the generators takes longer than a small transform, and is done once per batch.

        Raises:
            ValueError: The transform doesn't return a uint8 tensor (3, H, W).
        """
        with isolated_rng():
            return [self._sample(key) for key in keys]

    def _sample(self, key: int | SampleKey) -> Sample:
        if isinstance(key, tuple):
            index, seed = key
            seed_generators(seed)
        else:
            index = key
        source, label = self.dataset[index]
        image: object = self.transform(source)
        if not isinstance(image, Tensor):
            raise ValueError(f"a transform must return a uint8 tensor (3, H, W), not {type(image).__name__}")
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"a transform must return a uint8 tensor (3, H, W), not {image.dtype} {tuple(image.shape)}"
            )
        return image, label, index


class ImageSizeMismatch(ValueError):
    """The images of a batch differ in size."""


def collate(samples: Sequence[Sample], transform_key: str) -> Batch:
    """Collate samples into a batch.

    Args:
        transform_key: Config key of the transform, for the error message.

    Raises:
        ImageSizeMismatch: The images differ in size.
    """
    images, labels, indices = zip(*samples, strict=True)
    sizes = sorted({(image.shape[1], image.shape[2]) for image in images})
    if len(sizes) > 1:
        (h0, w0), (h1, w1) = sizes[0], sizes[-1]
        raise ImageSizeMismatch(
            f"the images of a batch differ in size ({h0}×{w0} and {h1}×{w1}): {transform_key} must bring all to one "
            f"size, for instance by a resize and a crop as in augmentation=imagenet"
        )
    return Batch(torch.stack(images), torch.tensor(labels, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64))
