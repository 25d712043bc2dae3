"""PASCAL VOC 2007 with boxes and several labels per image."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from torchvision.datasets import VOCDetection

from bcos_train.dataset.base import MAX_SKIPPED, ClassMap, ImageDataset, check_max_skipped, require_root
from bcos_train.dataset.boxes import check_boxes
from bcos_train.dataset.image import image_size
from bcos_train.dataset.storage.annotated import AnnotatedFiles, multi_hot
from bcos_train.utils.suggestions import suggest

__all__ = ["Voc2007", "VocPart"]

VocPart = Literal["train", "val", "trainval", "test"]


class Voc2007:
    """9,963 photographs with 24,640 objects in 20 classes (Everingham et al., 2010); labels are multi-hot.

    All objects count, including those marked "difficult". Official parts: 2,501 images for training, 2,510 for
    validation and 4,952 for the test.

    Args:
        root: Folder that contains ``VOCdevkit/VOC2007``, or into which it is downloaded.
        train, val: Part for training and part for validation: ``train``, ``val``, ``trainval`` or ``test``.
        download: Download parts that are missing.
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.
        max_skipped: Share of images that may be unreadable, see :func:`~bcos_train.dataset.base.check_max_skipped`.

    Raises:
        ValueError: ``root`` is None. On use: files are missing and can't be downloaded; an annotation is unreadable,
            has no objects or an unknown class, or a box that is empty or not inside the image.
    """

    name = "voc2007"
    root_variable = "DATA_ROOT"
    is_multi_label = True
    has_boxes = True

    def __init__(
        self,
        root: str | Path | None,
        train: VocPart = "train",
        val: VocPart = "val",
        download: bool = True,
        class_map: ClassMap | None = None,
        max_skipped: float = MAX_SKIPPED,
    ) -> None:
        self.root = require_root(root, "VOC 2007", "set DATA_ROOT or dataset.root")
        self.download = download
        self.class_map = class_map
        self.max_skipped = check_max_skipped(max_skipped)
        self.train_part = train
        self.val_part = val

    @property
    def class_names(self) -> list[str]:
        return [
            *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
            *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
            "tvmonitor",
        ]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare(self) -> None:
        """Download and unpack the parts that are missing (440 MB for training and validation, 430 MB for the test)."""
        for part in (self.train_part, self.val_part):
            if self._index(part).is_file():
                continue
            if not self.download:
                raise ValueError(
                    f"no VOC 2007 in {self.root} (expected {self._index(part).relative_to(self.root)}): set DATA_ROOT "
                    "or dataset.root to the folder that contains VOCdevkit, or dataset.download=true"
                )
            try:
                VOCDetection(str(self.root), year="2007", image_set=part, download=True)
            # URLError, a refused connection and a read-only folder are OSErrors.
            except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
                raise ValueError(
                    f"VOC 2007 could not be downloaded to {self.root} ({' '.join(str(error).split())}): unpack its tar "
                    "files there yourself, or set DATA_ROOT or dataset.root to the folder that contains VOCdevkit"
                ) from error

    def train(self) -> ImageDataset:
        return self._part(self.train_part)

    def val(self) -> ImageDataset:
        return self._part(self.val_part)

    def _index(self, part: str) -> Path:
        return self._folder / "ImageSets" / "Main" / f"{part}.txt"

    @property
    def _folder(self) -> Path:
        return self.root / "VOCdevkit" / "VOC2007"

    def _part(self, part: str) -> AnnotatedFiles:
        labels = {name: label for label, name in enumerate(self.class_names)}
        try:
            names = self._index(part).read_text(encoding="ascii").split()
        except FileNotFoundError:
            raise ValueError(f"no VOC 2007 in {self.root}: there is no {self._index(part)}") from None
        pictures = [f"{name}.jpg" for name in names]
        boxes = [
            read_boxes(self._folder / "Annotations" / f"{name}.xml", self._folder / "JPEGImages" / picture, labels)
            for name, picture in zip(names, pictures, strict=True)
        ]
        return AnnotatedFiles(self._folder / "JPEGImages", pictures, multi_hot(boxes, self.num_classes), boxes)


def read_boxes(path: Path, picture: Path, labels: dict[str, int]) -> np.ndarray:
    """Read the boxes of a VOC annotation: int64 ``(M, 5)``, M ≥ 1.

    Its corners count pixels from 1 and are both inside; ours count from 0, and the second one is outside.

    Args:
        path: The annotation.
        picture: Its image, read for its size if the annotation doesn't state it.
        labels: Class name -> label.

    Raises:
        ValueError: One line, beginning with the path.
    """
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        if not (width and height):
            width, height = image_size(picture)
        rows = [_read_object(element, labels) for element in root.iter("object")]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        message = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise ValueError(f"{path}: {message}") from error
    if not rows:
        raise ValueError(f"{path}: no object, so there are neither boxes nor labels")
    boxes = np.array(rows, dtype=np.int64)
    check_boxes(boxes, width, height, path)
    return boxes


def _read_object(element: ElementTree.Element, labels: dict[str, int]) -> tuple[int, int, int, int, int]:
    name = element.findtext("name", "").strip()
    if name not in labels:
        raise ValueError(f"unknown class {name!r}{suggest(name, labels)}")
    corners = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        if (text := element.findtext(f"bndbox/{key}")) is None:
            raise ValueError(f"an object of class {name} has no bndbox/{key}")
        corners.append(round(float(text)))
    x0, y0, x1, y1 = corners
    return labels[name], x0 - 1, y0 - 1, x1, y1
