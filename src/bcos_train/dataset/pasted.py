"""Composed images with exact boxes: CIFAR-10 images on photographs of textures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bcos_train.dataset.base import Annotations, ClassMap, ImageDataset, Label
from bcos_train.dataset.cifar10 import Cifar10
from bcos_train.dataset.randomness import Stream, random_words

__all__ = ["BACKGROUNDS", "Pasted"]

#: Photographs of scikit-image, 512×512, gray. The background of class c is number c % 3.
BACKGROUNDS = ("grass", "gravel", "brick")
_BACKGROUND_SIDE = 512
#: Positions that are tried for each object after the first, until one is free.
_ATTEMPTS = 20
MAX_OBJECTS = 16


class Pasted:
    """Composed images: CIFAR-10 images, scaled, at random places of photographs of grass, gravel or brick.

    These are compositions and not photographs of scenes; results on them should say so. In return, the boxes are exact,
    and the background can be made to predict the class in training only, as in Waterbirds (arXiv 1911.08731).

    Image i of a part contains image i of that part of CIFAR-10; further objects are other images of the same part.
    Objects don't overlap. Everything random is a function of ``seed``, the part and i.

    Args:
        root: As for :class:`~bcos_train.dataset.cifar10.Cifar10`.
        size: Side of the images in pixels, 32 to 512.
        min_scale, max_scale: Range of an object's side, as a fraction of ``size``.
        max_objects: Largest number of objects in an image, 1 to 16; the number is drawn from 1 to ``max_objects``, and
            less if there is no free place. More than 1: labels are multi-hot.
        background_correlation: Share of training images on the background of their class (grass for classes 0, 3, 6 and
            9, gravel for 1, 4 and 7, brick for 2, 5 and 8); the others are on one of the other two. Images then have
            groups, 3 * class + background. ``None``: any background is equally likely, without groups.
        val_background_correlation: The same share of the validation images; ``None``: reversed, 1 -
            ``background_correlation``.
        seed: Seeds the composition. It belongs to the data set: the seed of a run changes nothing.
        download: As for :class:`~bcos_train.dataset.cifar10.Cifar10`.
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.

    Raises:
        ValueError: A value is out of range, or several objects are to have a background each. Also as for
            :class:`~bcos_train.dataset.cifar10.Cifar10`.
    """

    name = "pasted"
    root_variable = "DATA_ROOT"
    has_boxes = True

    def __init__(
        self,
        root: str | Path | None,
        size: int = 96,
        min_scale: float = 0.25,
        max_scale: float = 0.5,
        max_objects: int = 1,
        background_correlation: float | None = None,
        val_background_correlation: float | None = None,
        seed: int = 0,
        download: bool = True,
        class_map: ClassMap | None = None,
    ) -> None:
        if not 32 <= size <= _BACKGROUND_SIDE:
            raise ValueError(f"size must lie between 32 and {_BACKGROUND_SIDE} pixels, not {size}")
        if not 0 < min_scale <= max_scale <= 1:
            raise ValueError(f"0 < min_scale <= max_scale <= 1 must hold; got {min_scale} and {max_scale}")
        if not 1 <= max_objects <= MAX_OBJECTS:
            raise ValueError(f"max_objects must lie between 1 and {MAX_OBJECTS}, not {max_objects}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        for name, value in (
            ("background_correlation", background_correlation),
            ("val_background_correlation", val_background_correlation),
        ):
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {value}")
        if background_correlation is None and val_background_correlation is not None:
            raise ValueError("val_background_correlation needs background_correlation")
        if background_correlation is not None and max_objects > 1:
            raise ValueError(f"background_correlation needs images of one class: max_objects=1, not {max_objects}")
        self.cifar10 = Cifar10(root, download=download)
        self.size = size
        self.sides = max(1, round(min_scale * size)), max(1, round(max_scale * size))
        self.max_objects = max_objects
        self.background_correlation = background_correlation
        if val_background_correlation is None and background_correlation is not None:
            val_background_correlation = 1 - background_correlation
        self.val_background_correlation = val_background_correlation
        self.seed = seed
        self.class_map = class_map

    @property
    def class_names(self) -> list[str]:
        return self.cifar10.class_names

    @property
    def num_classes(self) -> int:
        return self.cifar10.num_classes

    @property
    def is_multi_label(self) -> bool:
        return self.max_objects > 1

    @property
    def group_names(self) -> list[str] | None:
        """``"<class> on <background>"`` for each class and background, or None without a correlation."""
        if self.background_correlation is None:
            return None
        return [f"{name} on {background}" for name in self.class_names for background in BACKGROUNDS]

    def prepare(self) -> None:
        """Prepare CIFAR-10; the backgrounds are part of scikit-image."""
        self.cifar10.prepare()

    def train(self) -> ImageDataset:
        return _PastedImages(self, self.cifar10.train(), self.background_correlation, 0)

    def val(self) -> ImageDataset:
        return _PastedImages(self, self.cifar10.val(), self.val_background_correlation, 1)


class _PastedImages(Dataset[tuple[Image.Image, Label, Annotations]]):
    def __init__(self, source: Pasted, objects: ImageDataset, correlation: float | None, part: int) -> None:
        # Only this data set needs scikit-image's pictures.
        from skimage import data

        self._source = source
        self._objects = objects
        self._correlation = correlation
        self._part = part
        self._backgrounds = [Image.fromarray(getattr(data, name)()).convert("RGB") for name in BACKGROUNDS]

    def __len__(self) -> int:
        return len(self._objects)  # type: ignore[arg-type]  # map-style data sets have a length

    def digest(self) -> str:
        """Return a hash of the objects' names, if they have some, and of all settings."""
        source = self._source
        digest = getattr(self._objects, "digest", None)
        settings = (source.size, source.sides, source.max_objects, self._correlation, source.seed, self._part)
        return hashlib.sha256(repr((None if digest is None else digest(), settings)).encode()).hexdigest()

    def __getitem__(self, index: int) -> tuple[Image.Image, Label, Annotations]:
        source = self._source
        n_words = 8 + source.max_objects * (2 + 2 * _ATTEMPTS)
        words = iter(random_words(n_words, source.seed, Stream.COMPOSITION, self._part, index).tolist())
        picture, label = self._objects[index][:2]
        assert isinstance(label, int)
        background = self._choose_background(label, words)
        left, top = (next(words) % (_BACKGROUND_SIDE - source.size + 1) for _ in range(2))
        image = self._backgrounds[background].crop((left, top, left + source.size, top + source.size))
        boxes: list[tuple[int, int, int, int, int]] = []
        for n in range(1 + next(words) % source.max_objects):
            if n:
                picture, label = self._objects[next(words) % len(self)][:2]
                assert isinstance(label, int)
            if (box := self._place(label, boxes, words)) is not None:
                _, x0, y0, x1, y1 = box
                image.paste(picture.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR), (x0, y0))
                boxes.append(box)
        annotations = Annotations(
            np.array(boxes, dtype=np.int64),
            None if self._correlation is None else len(BACKGROUNDS) * boxes[0][0] + background,
        )
        if not source.is_multi_label:
            return image, label, annotations
        multi_hot = np.zeros(source.num_classes, dtype=np.float32)
        multi_hot[[box[0] for box in boxes]] = 1
        return image, multi_hot, annotations

    def _choose_background(self, label: int, words: Iterator[int]) -> int:
        uniform, choice = (next(words) >> 11) * 2.0**-53, next(words)
        if self._correlation is None:
            return choice % len(BACKGROUNDS)
        own = label % len(BACKGROUNDS)
        return own if uniform < self._correlation else (own + 1 + choice % (len(BACKGROUNDS) - 1)) % len(BACKGROUNDS)

    def _place(
        self, label: int, boxes: list[tuple[int, int, int, int, int]], words: Iterator[int]
    ) -> tuple[int, int, int, int, int] | None:
        """Draw a box that overlaps none of ``boxes``; None if there is no place."""
        smallest, largest = self._source.sides
        side = smallest + next(words) % (largest - smallest + 1)
        for _ in range(_ATTEMPTS):
            x, y = (next(words) % (self._source.size - side + 1) for _ in range(2))
            if all(x + side <= x0 or x >= x1 or y + side <= y0 or y >= y1 for _, x0, y0, x1, y1 in boxes):
                return label, x, y, x + side, y + side
        return None
