"""ImageNet-1k (ILSVRC 2012) from its image folders."""

from __future__ import annotations

import logging
import re
from functools import cached_property
from pathlib import Path

from bcos_train.dataset.base import MAX_SKIPPED, ClassMap, ImageDataset, check_max_skipped, require_root
from bcos_train.dataset.split import Split
from bcos_train.dataset.storage.folder import FolderImages, list_classes
from bcos_train.dataset.storage.shards import ShardImages, Storage, choose_shards
from bcos_train.utils.terminal import printable

__all__ = ["ImageNet"]

_logger = logging.getLogger(__name__)
_HINT = "set IMAGENET_PATH or dataset.root to the folder that contains train/ and val/"
_NUM_CLASSES = 1000
_NUM_TRAIN = 1_281_167
_NUM_VAL = 50_000


class ImageNet:
    """1,000 classes, 1,281,167 training and 50,000 validation images in ``root/{train,val}/<wnid>/``.

    Subsets can be used too: a different number of images is only a warning. ``num_classes`` is always 1000, and labels
    are the official ones if the folders are named by wnid.

    Args:
        root: Folder that contains both parts.
        train: Folder name of the training part.
        val: Folder name of the validation part.
        exif_orientation: Rotate and flip images as their EXIF tag says, see :func:`~bcos_train.dataset.image.to_rgb`.
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.
        max_skipped: Share of images that may be unreadable, see :func:`~bcos_train.dataset.base.check_max_skipped`.
        storage, shards: Image files in ``root``, or shards, see :class:`~bcos_train.dataset.storage.shards.Shards`.
        shots, val_per_class, split_seed: A few images of each class, see :class:`~bcos_train.dataset.split.Split`.

    Raises:
        ValueError: ``root`` is None; on use: folders are missing, empty, or more than 1000.
    """

    name = "imagenet"
    root_variable = "IMAGENET_PATH"

    def __init__(
        self,
        root: str | Path | None,
        train: str = "train",
        val: str = "val",
        exif_orientation: bool = False,
        class_map: ClassMap | None = None,
        max_skipped: float = MAX_SKIPPED,
        storage: Storage = "folder",
        shards: str | dict[str, str] | None = None,
        shots: int | None = None,
        val_per_class: int | None = None,
        split_seed: int = 42,
    ) -> None:
        self._shards = choose_shards(storage, shards)
        if self._shards is None:
            self.root = require_root(root, "ImageNet", _HINT)
        self.train_folder = train
        self.val_folder = val
        self.exif_orientation = exif_orientation
        self.class_map = class_map
        self.max_skipped = check_max_skipped(max_skipped)
        self._split = Split(shots, val_per_class, split_seed)

    @property
    def num_classes(self) -> int:
        return _NUM_CLASSES

    @cached_property
    def class_names(self) -> list[str]:
        """1000 names by label: readable ones if the labels are the official ones, otherwise those of the folders."""
        if self._shards is not None or self._has_official_labels:
            from torchvision.models._meta import _IMAGENET_CATEGORIES

            return list(_IMAGENET_CATEGORIES)
        names = [f"class {label}" for label in range(_NUM_CLASSES)]
        for folder, label in self._labels.items():
            names[label] = folder
        return names

    def prepare(self) -> None:
        """Check that the folders exist, or read the index of the shards."""
        if self._shards is not None:
            self._shards.prepare(self._split.parts)
        else:
            _ = self._labels

    def train(self) -> ImageDataset:
        return self._split.train(self._training_images, self.class_names)

    def val(self) -> ImageDataset:
        if self._split.val_per_class is None:
            return self._part(train=False)
        return self._split.val(self._training_images, self.class_names)

    @cached_property
    def _training_images(self) -> FolderImages | ShardImages:
        return self._part(train=True)

    @cached_property
    def _folders(self) -> list[str]:
        return list_classes(self.root, self.val_folder, "dataset.val", _HINT)

    @cached_property
    def _has_official_labels(self) -> bool:
        """True if the folders are named by ImageNet's wnids."""
        if not all(re.fullmatch(r"n\d{8}", name) for name in self._folders):
            return False
        # The official labels are the indices of the sorted wnids: with all 1000 folders no list of them is needed.
        return len(self._folders) == _NUM_CLASSES or set(self._folders) <= set(_wnids())

    @cached_property
    def _labels(self) -> dict[str, int]:
        """Label by folder name."""
        folders = self._folders
        if len(folders) > _NUM_CLASSES:
            raise ValueError(
                f"{self.root / self.val_folder} has {len(folders)} class folders, ImageNet-1k has {_NUM_CLASSES}: "
                f"{_HINT}, or use dataset=imagefolder"
            )
        if self._has_official_labels and len(folders) < _NUM_CLASSES:
            labels = _label_of_wnid()
            return {name: labels[name] for name in folders}
        if not self._has_official_labels:
            _logger.warning(
                "%s: the %d class folders are not named by ImageNet's wnids, so the class indices are not the official "
                "ones",
                printable(str(self.root / self.val_folder)),
                len(folders),
            )
        return {name: label for label, name in enumerate(folders)}

    def _part(self, train: bool) -> FolderImages | ShardImages:
        images: FolderImages | ShardImages
        if self._shards is not None:
            where, images = "the shards", self._shard_images("train" if train else "val")
        elif train:
            where, images = str(self.root / self.train_folder), self._folder_images(self.train_folder, "dataset.train")
        else:
            where, images = str(self.root / self.val_folder), self._folder_images(self.val_folder, "dataset.val")
        expected = _NUM_TRAIN if train else _NUM_VAL
        if len(images) != expected:
            _logger.warning(
                "%s contains %s images, the complete ImageNet %s", printable(where), f"{len(images):,}", f"{expected:,}"
            )
        return images

    def _shard_images(self, part: str) -> ShardImages:
        assert self._shards is not None
        return self._shards.images(part, _label_of_wnid, _NUM_CLASSES, self.exif_orientation)

    def _folder_images(self, part: str, key: str) -> FolderImages:
        folders = list_classes(self.root, part, key, _HINT)
        unknown = sorted(set(folders) - set(self._labels))
        if unknown:
            raise ValueError(
                f"{self.root / part} has class folders that {self.val_folder}/ lacks, such as {unknown[0]}: {_HINT}"
            )
        labels = {name: self._labels[name] for name in folders}
        return FolderImages(self.root / part, labels, _HINT, self.exif_orientation)


def _label_of_wnid() -> dict[str, int]:
    return {wnid: label for label, wnid in enumerate(_wnids())}


def _wnids() -> list[str]:
    """Return the 1000 wnids in the order of the official labels."""
    # timm contains the list; its import is slow, and only subsets of ImageNet need it.
    from timm.data import ImageNetInfo

    return ImageNetInfo().label_names()
