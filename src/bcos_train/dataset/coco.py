"""COCO 2014 with boxes and several labels per image."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from bcos_train.dataset.base import MAX_SKIPPED, ClassMap, ImageDataset, check_max_skipped, require_root
from bcos_train.dataset.boxes import check_boxes
from bcos_train.dataset.randomness import Stream, permutation
from bcos_train.dataset.storage.annotated import AnnotatedFiles, multi_hot
from bcos_train.utils.terminal import printable

if TYPE_CHECKING:
    from pycocotools.coco import COCO

__all__ = ["Coco"]

_logger = logging.getLogger(__name__)

_FOLDERS = {"train": "train2014", "val": "train2014", "test": "val2014"}


class Coco:
    """COCO 2014: 122,000 photographs with objects of 80 classes (Lin et al., arXiv 1405.0312); labels are multi-hot.

    As in "Studying How to Efficiently and Effectively Guide Models with Explanations" (arXiv 2303.11932), a part of
    ``train2014`` is for validation, and ``val2014`` for the test. Which part is fixed here by the images' numbers; the
    paper's own is not published. All objects count, including crowds. Images without objects are left out.

    Args:
        root: Folder that contains ``train2014/``, ``val2014/`` and ``annotations/instances_{train,val}2014.json``.
        val: Part for validation: ``val`` or ``test``.
        val_fraction: Fraction of the images of ``train2014`` that are for validation, in (0, 1).
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.
        max_skipped: Share of images that may be unreadable, see :func:`~bcos_train.dataset.base.check_max_skipped`.

    Raises:
        ValueError: ``root`` is None, or ``val_fraction`` out of range. On use: files are missing or unreadable, or a
            box is not inside its image.
    """

    name = "coco"
    root_variable = "DATA_ROOT"
    is_multi_label = True
    has_boxes = True

    def __init__(
        self,
        root: str | Path | None,
        val: Literal["val", "test"] = "val",
        val_fraction: float = 0.1,
        class_map: ClassMap | None = None,
        max_skipped: float = MAX_SKIPPED,
    ) -> None:
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, not {val_fraction}")
        self.root = require_root(root, "COCO", "set DATA_ROOT or dataset.root")
        self.val_part = val
        self.val_fraction = val_fraction
        self.class_map = class_map
        self.max_skipped = check_max_skipped(max_skipped)

    @cached_property
    def class_names(self) -> list[str]:
        """Names of the categories, in the order of their ids; a class's label is its index in the list."""
        return [category["name"] for _, category in sorted(self._read(_FOLDERS[self.val_part]).cats.items())]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare(self) -> None:
        """Read the validation part's annotations."""
        _ = self.class_names

    def train(self) -> ImageDataset:
        return self._part("train")

    def val(self) -> ImageDataset:
        return self._part(self.val_part)

    def _read(self, folder: str) -> COCO:
        path = self._annotations(folder)
        try:
            from pycocotools.coco import COCO
        except ModuleNotFoundError:
            raise ValueError("COCO's annotations are read with pycocotools: pip install pycocotools") from None
        if not path.is_file():
            raise ValueError(f"there is no {path}: set DATA_ROOT or dataset.root to COCO's folder")
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
                return COCO(str(path))
        except (OSError, AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from error

    def _annotations(self, folder: str) -> Path:
        return self.root / "annotations" / f"instances_{folder}.json"

    def _part(self, part: str) -> AnnotatedFiles:
        folder = _FOLDERS[part]
        coco = self._read(folder)
        labels = {category: label for label, category in enumerate(sorted(coco.cats))}
        if [coco.cats[category]["name"] for category in labels] != self.class_names:
            raise ValueError(f"{self._annotations(folder)} has other categories than the validation part")
        images = sorted(image for image in coco.imgs if coco.imgToAnns.get(image))
        if part != "test":
            order = permutation(len(images), 0, Stream.SPLIT)
            n_val = max(1, round(self.val_fraction * len(images)))
            images = [images[i] for i in sorted(order[:n_val] if part == "val" else order[n_val:])]
        boxes, n_empty = [], 0
        for image in images:
            rows = [_corners(annotation["bbox"], coco.imgs[image]) for annotation in coco.imgToAnns[image]]
            classes = [labels[annotation["category_id"]] for annotation in coco.imgToAnns[image]]
            array = np.column_stack([classes, rows]).astype(np.int64)
            # The published files have a few boxes without any width or height.
            is_empty = (array[:, 1] >= array[:, 3]) | (array[:, 2] >= array[:, 4])
            n_empty += int(is_empty.sum())
            boxes.append(array[~is_empty])
            info = coco.imgs[image]
            check_boxes(boxes[-1], info["width"], info["height"], f"{self._annotations(folder)}, {info['file_name']}")
        if n_empty:
            _logger.warning("%s: left out %d empty boxes", printable(str(self._annotations(folder))), n_empty)
        names = [coco.imgs[image]["file_name"] for image in images]
        return AnnotatedFiles(self.root / folder, names, multi_hot(boxes, self.num_classes), boxes)


def _corners(box: list[float], image: dict[str, int]) -> tuple[int, int, int, int]:
    """Return the corners of the whole pixels that a box ``[x, y, width, height]`` touches."""
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return 0, 0, 0, 0
    # Some boxes end a fraction of a pixel outside of the image.
    x1, y1 = math.ceil(x + width - 1e-6), math.ceil(y + height - 1e-6)
    x1, y1 = (limit if end == limit + 1 else end for end, limit in ((x1, image["width"]), (y1, image["height"])))
    return math.floor(x), math.floor(y), x1, y1
