"""Samples whose augmentation depends on nothing but their key, and their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bcos_train.dataset.batch import Batch
from bcos_train.dataset.randomness import isolated_rng, seed_generators
from bcos_train.dataset.sampler import SampleKey

__all__ = ["Collate", "SeededDataset", "Transform", "UnevenImages"]

Transform = Callable[[Image.Image], Tensor]


class SeededDataset(Dataset[tuple[Tensor, int, int]]):
    """A data set with its transform applied: sample -> (uint8 (3,H,W), label, index).

    The key ``(index, seed)`` seeds the random generators for this one sample: the result is the same in any worker
    process and in none. A plain index is for transforms without chance. Outside, the generators never change.
    """

    def __init__(self, dataset: Dataset[tuple[Image.Image, int]], transform: Transform) -> None:
        self.dataset = dataset
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style data sets have a length

    def __getitem__(self, key: int | SampleKey) -> tuple[Tensor, int, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> list[tuple[Tensor, int, int]]:
        """A batch at once, as the loader asks for it: saving the generators costs more than a small transform."""
        with isolated_rng():
            return [self._sample(key) for key in keys]

    def _sample(self, key: int | SampleKey) -> tuple[Tensor, int, int]:
        if isinstance(key, tuple):
            index, seed = key
            seed_generators(seed)
        else:
            index = key
        image, label = self.dataset[index]
        return self._checked(self.transform(image)), label, index

    @staticmethod
    def _checked(image: Any) -> Tensor:
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            got = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"a transform must give a uint8 tensor (3,H,W), not {got}")
        return image


class UnevenImages(ValueError):
    """Images that are to make up a batch differ in size."""


class Collate:
    """Collate a list of samples into a :class:`Batch`.

    Args:
        transform_key: what to name in the error if the images differ in size.

    Raises:
        UnevenImages: on a call, if they do.
    """

    def __init__(self, transform_key: str) -> None:
        self.transform_key = transform_key

    def __call__(self, samples: Sequence[tuple[Tensor, int, int]]) -> Batch:
        images, labels, indices = zip(*samples, strict=True)
        sizes = sorted({(image.shape[1], image.shape[2]) for image in images})
        if len(sizes) > 1:
            (h0, w0), (h1, w1) = sizes[0], sizes[-1]
            raise UnevenImages(
                f"the images of a batch differ in size ({h0}×{w0} and {h1}×{w1}): {self.transform_key} must bring "
                f"all to one size, as augmentation=imagenet does by a resize and a crop"
            )
        return Batch(
            torch.stack(images), torch.tensor(labels, dtype=torch.int64), torch.tensor(indices, dtype=torch.int64)
        )
