"""Waterbirds: birds on backgrounds that predict their class in training only."""

from __future__ import annotations

import csv
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from bcos_train.dataset.base import MAX_SKIPPED, ClassMap, ImageDataset, check_max_skipped, require_root
from bcos_train.dataset.boxes import check_boxes
from bcos_train.dataset.image import image_size
from bcos_train.dataset.storage.annotated import AnnotatedFiles
from bcos_train.utils.suggestions import join_words

__all__ = ["Waterbirds"]

_SPLITS = {"train": "0", "val": "1", "test": "2"}
_COLUMNS = ("img_filename", "y", "split", "place")


class Waterbirds:
    """11,788 composed images of landbirds and waterbirds, on land or water (Sagawa et al., arXiv 1911.08731).

    In training, 95 % of the birds are on the background of their class; in validation and test, half of them. Groups
    are 2 * class + place.

    Args:
        root: Folder that contains ``metadata.csv`` with the columns ``img_filename``, ``y``, ``split`` (0: training, 1:
            validation, 2: test) and ``place``, and the images.
        val: Part for validation: ``val`` or ``test``.
        boxes: ``bounding_boxes.txt`` of CUB-200-2011, which the birds are from (needs the column ``img_id``): a line
            "id x y width height" per image; a relative path starts at ``root``. ``None``: no boxes.
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.
        max_skipped: Share of images that may be unreadable, see :func:`~bcos_train.dataset.base.check_max_skipped`.

    Raises:
        ValueError: ``root`` is None. On use: files or columns are missing, a value is unknown, or a box is missing,
            empty or not inside its image.
    """

    name = "waterbirds"
    root_variable = "DATA_ROOT"

    def __init__(
        self,
        root: str | Path | None,
        val: Literal["val", "test"] = "val",
        boxes: str | None = None,
        class_map: ClassMap | None = None,
        max_skipped: float = MAX_SKIPPED,
    ) -> None:
        self.root = require_root(root, "Waterbirds", "set DATA_ROOT or dataset.root")
        self.val_part = val
        self.boxes = None if boxes is None else self.root / Path(boxes).expanduser()
        self.class_map = class_map
        self.max_skipped = check_max_skipped(max_skipped)

    @property
    def class_names(self) -> list[str]:
        return ["landbird", "waterbird"]

    @property
    def num_classes(self) -> int:
        return 2

    @property
    def has_boxes(self) -> bool:
        return self.boxes is not None

    @property
    def group_names(self) -> list[str]:
        return [f"{name} on {place}" for name in self.class_names for place in ("land", "water")]

    def prepare(self) -> None:
        """Read the index."""
        _ = self._rows

    def train(self) -> ImageDataset:
        return self._part("train")

    def val(self) -> ImageDataset:
        return self._part(self.val_part)

    @cached_property
    def _rows(self) -> list[dict[str, str]]:
        path = self.root / "metadata.csv"
        if not path.is_file():
            raise ValueError(f"{self.root} has no metadata.csv: set DATA_ROOT or dataset.root to Waterbirds' folder")
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            columns = [*_COLUMNS, *(["img_id"] if self.has_boxes else [])]
            if missing := [name for name in columns if name not in (reader.fieldnames or [])]:
                raise ValueError(f"{path} lacks the column {join_words(missing, 'and')}")
            rows = list(reader)
        for line, row in enumerate(rows, 2):
            for key, allowed in (("y", "01"), ("place", "01"), ("split", "012")):
                if row[key] not in tuple(allowed):
                    raise ValueError(f"{path}, line {line}: {key} is {row[key]!r}, allowed are {join_words(allowed)}")
        return rows

    def _part(self, part: str) -> AnnotatedFiles:
        rows = [row for row in self._rows if row["split"] == _SPLITS[part]]
        labels = np.array([int(row["y"]) for row in rows], dtype=np.int64)
        groups = 2 * labels + np.array([int(row["place"]) for row in rows], dtype=np.int64)
        return AnnotatedFiles(self.root, [row["img_filename"] for row in rows], labels, self._read_boxes(rows), groups)

    def _read_boxes(self, rows: list[dict[str, str]]) -> list[np.ndarray] | None:
        path = self.boxes
        if path is None:
            return None
        try:
            lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
            corners = {line[0]: [float(number) for number in line[1:]] for line in lines if line}
        except (OSError, ValueError) as error:
            message = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise ValueError(f"boxes={path}: {message}") from error
        boxes = []
        for row in rows:
            file = self.root / row["img_filename"]
            if len(corners.get(row["img_id"], ())) != 4:
                raise ValueError(f"{path}: no box for image {row['img_id']}, {file}")
            x, y, width, height = corners[row["img_id"]]
            box = [int(row["y"]), round(x), round(y), round(x + width), round(y + height)]
            boxes.append(np.array([box], dtype=np.int64))
            check_boxes(boxes[-1], *image_size(file), file)
        return boxes
