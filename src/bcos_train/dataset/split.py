"""Draw a few images of each class for training, and a validation part from the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Subset

from bcos_train.dataset.base import ImageDataset
from bcos_train.dataset.randomness import Stream, permutation
from bcos_train.dataset.subset import labels_of

__all__ = ["Split"]


@dataclass(frozen=True)
class Split:
    """Class-balanced parts of the training images of a data set with one label per image.

    The images of each class are shuffled by the seed. The first ``val_per_class`` are the validation part, the next
    ``shots`` the training part (arXiv 2402.03119 holds out 50 images per class of ImageNet and trains
    with 50 or 200 shots). With the same seed, the images of a smaller number of shots are among those of a larger one.

    Args:
        shots: Number of training images of each class; ``None``: all that are not in the validation part.
        val_per_class: Number of validation images of each class; ``None``: the data set's own validation part.
        seed: Of the draw.

    Raises:
        ValueError: A number is out of range.
    """

    shots: int | None = None
    val_per_class: int | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        for key, value, minimum in (
            ("shots", self.shots, 1),
            ("val_per_class", self.val_per_class, 1),
            ("split_seed", self.seed, 0),
        ):
            if value is not None and value < minimum:
                raise ValueError(f"{key}={value}: at least {minimum}")

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the data set that are used: ``"train"``, and ``"val"`` if it is not cut from it."""
        return ("train", "val") if self.val_per_class is None else ("train",)

    def train(self, images: ImageDataset, class_names: Sequence[str]) -> ImageDataset:
        """Return the training part of the training images ``images``.

        Raises:
            ValueError: A class has too few images.
        """
        if self.shots is None and self.val_per_class is None:
            return images
        start = self.val_per_class or 0
        stop = None if self.shots is None else start + self.shots
        return _Part(images, [shuffled[start:stop] for shuffled in self._shuffled_classes(images, class_names)])

    def val(self, images: ImageDataset, class_names: Sequence[str]) -> ImageDataset:
        """Return the validation part of the training images ``images``; only if ``val_per_class`` is not None.

        Raises:
            ValueError: A class has too few images.
        """
        assert self.val_per_class is not None
        return _Part(images, [part[: self.val_per_class] for part in self._shuffled_classes(images, class_names)])

    def _shuffled_classes(self, images: ImageDataset, class_names: Sequence[str]) -> list[np.ndarray]:
        """Return the shuffled indices of the images of each class."""
        labels = labels_of(images)
        present, counts = np.unique(labels, return_counts=True)
        held_out = self.val_per_class or 0
        smallest = int(counts.argmin())
        if counts[smallest] < held_out + (self.shots or 1):  # without shots, one image is left for training
            key = f"val_per_class={held_out}" if counts[smallest] <= held_out else f"shots={self.shots}"
            besides = f" and val_per_class={held_out}" if held_out and key.startswith("shots") else ""
            name = class_names[int(present[smallest])]
            raise ValueError(f"{key}{besides}: class {name!r} has {counts[smallest]} training images")
        by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
        return [
            indices[permutation(len(indices), self.seed, Stream.SHOTS, int(label))]
            for label, indices in zip(present, by_class, strict=True)
        ]


class _Part(Subset):
    """Some images of a data set; its digest is that of all of them, by which the part is defined.

    Args:
        indices: Of the images, in several arrays; sorted, as a data set in order is read faster.
    """

    def __init__(self, images: ImageDataset, indices: Sequence[np.ndarray]) -> None:
        super().__init__(images, np.sort(np.concatenate(indices)).tolist())

    def digest(self) -> str | None:
        digest = getattr(self.dataset, "digest", None)
        return None if digest is None else str(digest())
