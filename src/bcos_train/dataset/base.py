"""Interface of data sets to the rest of the project."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

__all__ = [
    "MAX_SKIPPED",
    "Annotations",
    "Cache",
    "ClassMap",
    "ImageDataset",
    "ImageSource",
    "Label",
    "check_max_skipped",
    "require_root",
]


@dataclass(frozen=True)
class Annotations:
    """What is known about an image besides its label.

    Attributes:
        boxes: int64 ``(M, 5)``, rows ``[class, x0, y0, x1, y1]`` in pixels of the image, half-open: a box contains the
            columns x0 ≤ x < x1 and the rows y0 ≤ y < y1. ``None``: the data set has no boxes.
        group: Index of the image's group, such as a combination of class and background; ``None``: no groups.
    """

    boxes: np.ndarray | None = None
    group: int | None = None


Label = int | np.ndarray
"""Class index in [0, num_classes), or multi-hot float32 ``(num_classes,)`` if an image can have several classes."""

ImageDataset = Dataset[tuple[Image.Image, int] | tuple[Image.Image, Label, Annotations]]
"""Map-style: index -> (RGB image, label), or (RGB image, label, annotations) for all indices.

The method ``digest() -> str``, which changes with the images' names, is optional.
"""

Cache = Literal["device"]
"""Where the images of a data set are kept during a run.

``"device"``: as one uint8 tensor on each training device, where batches are sliced and augmented without worker
processes (see :class:`~bcos_train.dataset.device_cache.DeviceCache`). Results are bit-identical. The images must fit
into memory and have the same size, and the only random transforms are ``RandomCrop`` and ``RandomHorizontalFlip``.
"""

#: Default of ``dataset.max_skipped``.
MAX_SKIPPED = 0.001

ClassMap = Mapping[str, str | int]
"""Class name of a data set -> class of a trained model, by name or index; a number that is also a name is the name.

Classes that are not in the map keep their name. It applies wherever a trained model meets the data set: an evaluation,
or a training that starts from weights and keeps their classifier.
"""


class ImageSource(Protocol):
    """A data set with a training and a validation part.

    ``prepare`` (download, unpack) is called once, on one process per node, before the other methods.

    These attributes are optional:

    * ``cache: Cache | None`` and ``class_map: ClassMap | None``
    * ``is_multi_label: bool``: labels are multi-hot
    * ``max_skipped: float``: see :func:`check_max_skipped`; 0 without it
    * ``has_boxes: bool``: images have :class:`Annotations` with boxes
    * ``group_names: list[str] | None``: images have :class:`Annotations` with a group, an index in this list
    """

    name: str

    @property
    def class_names(self) -> list[str]: ...

    @property
    def num_classes(self) -> int: ...

    def prepare(self) -> None: ...

    def train(self) -> ImageDataset: ...

    def val(self) -> ImageDataset: ...


def check_max_skipped(value: float) -> float:
    """Return ``dataset.max_skipped``, the share of a part's images that may be unreadable; at least one may be.

    They are named in the log and counted: in training another image takes the place, in validation they are left out.
    With 0, the first one is an error.

    Raises:
        ValueError: It isn't in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"max_skipped={value}: a share of the images, from 0 to below 1")
    return value


def require_root(root: str | Path | None, name: str, hint: str) -> Path:
    """Return the root folder as a path.

    Args:
        name: Name of the data set, for the error message.
        hint: How to set the folder, for the error message.

    Raises:
        ValueError: ``root`` is None or empty.
    """
    if root is None or not str(root):
        raise ValueError(f"no folder is set for {name}: {hint}")
    return Path(root).expanduser()
