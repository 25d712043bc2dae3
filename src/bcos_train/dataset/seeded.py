"""Samples whose augmentation depends only on their key, and their collation to batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from bcos_train.dataset.base import Annotations, ImageDataset, Label
from bcos_train.dataset.batch import Batch
from bcos_train.dataset.boxes import pad_boxes, transform_with_boxes
from bcos_train.dataset.image import UnreadableImage, is_skippable
from bcos_train.dataset.randomness import Stream, isolated_rng, random_words, seed_generators
from bcos_train.dataset.sampler import SampleKey
from bcos_train.dataset.unreadable import Unreadable
from bcos_train.dataset.window import draw_window

__all__ = [
    "ImageSizeMismatch",
    "Lookup",
    "Sample",
    "SeededDataset",
    "Transform",
    "collate",
    "collate_readable",
    "join_batches",
    "loader_collation",
    "read_batch",
]

#: Samples that are tried in place of an unreadable one.
_MAX_REPLACEMENTS = 100


Transform = Callable[[Image.Image], Tensor]
"""PIL image -> uint8 (3, H, W)."""

Extras = dict[str, Tensor]
"""Further data of a sample by its name in ``Batch.extras``, see :class:`~bcos_train.dataset.batch.Batch`."""

Lookup = Callable[[int], Mapping[str, Tensor]]
"""Index in the data set -> extras of the unchanged image, of one shape for all images."""

Sample = tuple[Tensor, Label, int] | tuple[Tensor, Label, int, Extras]
"""Image uint8 (3, H, W), label, index in the data set, and extras if there are some."""


class SeededDataset(Dataset[Sample]):
    """A data set with its transform applied.

    The seed of a key ``(index, seed)`` is set before its sample is transformed: the result is the same in any process.
    A plain index is for deterministic transforms. The state of the random generators stays unchanged.

    Args:
        lookup: Returns further extras, such as a teacher's maps; ``"window"`` then tells which part of the image the
            sample shows. The transform passes :func:`~bcos_train.dataset.window.check_has_window`.
        skips: Leave out unreadable samples and return :class:`~bcos_train.dataset.unreadable.Unreadable` for each; with
            a seed, another sample takes the place, as a function of the seed. False: they raise an error.
    """

    def __init__(
        self, dataset: ImageDataset, transform: Transform, lookup: Lookup | None = None, skips: bool = False
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.lookup = lookup
        self.skips = skips

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style data sets have a length

    def __getitem__(self, key: int | SampleKey) -> Sample:
        """Return a sample; one that can't be read raises an error."""
        with isolated_rng():
            return self._sample(key)

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> list[Sample | Unreadable]:
        """Return the samples of a batch; used by DataLoader.

        Saving and restoring the generators takes longer than a small transform, and is done once per batch.

        Raises:
            ValueError: The transform doesn't return a uint8 tensor (3, H, W).
        """
        with isolated_rng():
            if not self.skips:
                return [self._sample(key) for key in keys]
            return [sample for key in keys for sample in self._readable(key)]

    def _readable(self, key: int | SampleKey) -> Iterator[Sample | Unreadable]:
        """Yield the sample of a key; if it can't be read, what is wrong, and with a seed the sample in its place."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        others = () if seed is None else random_words(_MAX_REPLACEMENTS, seed, Stream.REPLACEMENT) % len(self)
        for candidate in (index, *map(int, others)):
            try:
                yield self._sample(candidate if seed is None else (candidate, seed))
            except UnreadableImage as error:
                if not is_skippable(error):
                    raise
                yield Unreadable(candidate, str(error))
            else:
                return

    def _sample(self, key: int | SampleKey) -> Sample:
        if isinstance(key, tuple):
            index, seed = key
            seed_generators(seed)
        else:
            index = key
        source, label, *annotations = self.dataset[index]
        extras = None
        image: object
        if annotations:
            image, extras = self._transform_annotated(source, *annotations)
        else:
            image = self.transform(source)
        if not isinstance(image, Tensor):
            raise ValueError(f"a transform must return a uint8 tensor (3, H, W), not {type(image).__name__}")
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(
                f"a transform must return a uint8 tensor (3, H, W), not {image.dtype} {tuple(image.shape)}"
            )
        if self.lookup is not None:
            if isinstance(key, tuple):  # the same random numbers again
                seed_generators(seed)
            extras = {**(extras or {}), **self.lookup(index), "window": draw_window(self.transform, *source.size)}
        return (image, label, index) if extras is None else (image, label, index, extras)

    def _transform_annotated(self, image: Image.Image, annotations: Annotations) -> tuple[Tensor, Extras]:
        extras: Extras = {}
        if annotations.boxes is None:
            transformed = self.transform(image)
        else:
            transformed, extras["boxes"] = transform_with_boxes(self.transform, image, annotations.boxes)
        if annotations.group is not None:
            extras["groups"] = torch.tensor(annotations.group)
        return transformed, extras


class ImageSizeMismatch(ValueError):
    """The images of a batch differ in size."""


def collate_readable(
    samples: Sequence[Sample | Unreadable], transform_key: str
) -> tuple[Batch | None, tuple[Unreadable, ...]]:
    """Collate the readable samples into a batch, None if there are none; the others are returned beside it.

    Args:
        transform_key: Config key of the transform, for the error message.

    Raises:
        ImageSizeMismatch: The images differ in size.
    """
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    unreadable = tuple(sample for sample in samples if isinstance(sample, Unreadable))
    return collate(readable, transform_key) if readable else None, unreadable


def loader_collation(samples: SeededDataset, transform_key: str) -> Callable[..., object]:
    """Return the collation for a loader: :func:`collate_readable` if unreadable samples are left out."""
    return partial(collate_readable if samples.skips else collate, transform_key=transform_key)


def read_batch(samples: SeededDataset, keys: Sequence[int | SampleKey], transform_key: str) -> Batch:
    """Return samples as a batch; see :func:`collate`.

    Raises:
        UnreadableImage: None of them can be read.
    """
    batch, unreadable = collate_readable(samples.__getitems__(keys), transform_key)
    if batch is None:
        raise UnreadableImage(unreadable[0].message)
    return batch


def collate(samples: Sequence[Sample], transform_key: str) -> Batch:
    """Collate samples into a batch.

    Args:
        transform_key: Config key of the transform, for the error message.

    Raises:
        ImageSizeMismatch: The images differ in size.
    """
    images, labels, indices, *extras = zip(*samples, strict=True)
    _check_sizes(images, transform_key)
    is_multi_label = isinstance(labels[0], np.ndarray)
    return Batch(
        torch.stack(images),
        torch.from_numpy(np.stack(labels)) if is_multi_label else torch.tensor(labels, dtype=torch.int64),
        torch.tensor(indices, dtype=torch.int64),
        _collate_extras(extras[0]) if extras else None,
    )


def _check_sizes(images: Sequence[Tensor], transform_key: str) -> None:
    sizes = sorted({(image.shape[-2], image.shape[-1]) for image in images})
    if len(sizes) > 1:
        (h0, w0), (h1, w1) = sizes[0], sizes[-1]
        raise ImageSizeMismatch(
            f"the images of a batch differ in size ({h0}×{w0} and {h1}×{w1}): {transform_key} must bring all to one "
            f"size, for instance by a resize and a crop as in augmentation=imagenet"
        )


def _collate_extras(extras: Sequence[Extras]) -> dict[str, Tensor]:
    columns = {name: [sample[name] for sample in extras] for name in extras[0]}
    return {name: pad_boxes(values) if name == "boxes" else torch.stack(values) for name, values in columns.items()}


def join_batches(batches: Sequence[Batch], transform_key: str) -> Batch:
    """Concatenate batches of a data set; the boxes are padded to the largest number in any of them.

    Raises:
        ImageSizeMismatch: The images differ in size.
    """
    _check_sizes([batch.images for batch in batches], transform_key)
    rows = [
        {name: values[n] for name, values in batch.extras.items()}
        for batch in batches
        if batch.extras is not None
        for n in range(len(batch.images))
    ]
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.labels for batch in batches]),
        torch.cat([batch.indices for batch in batches]),
        _collate_extras(rows) if rows else None,
    )
