"""CIFAR-10 from its official archive, or from a folder of image files."""

from __future__ import annotations

import tarfile
from functools import cached_property
from pathlib import Path

from torchvision.datasets import CIFAR10

from bcos_train.dataset.base import MAX_SKIPPED, Cache, ClassMap, ImageDataset, check_max_skipped, require_root
from bcos_train.dataset.folder import ImageFolder
from bcos_train.dataset.split import Split
from bcos_train.dataset.storage.shards import Storage, choose_shards

__all__ = ["Cifar10"]


class Cifar10:
    """60,000 color images of 32×32 pixels in 10 classes, 50,000 of them for training (Krizhevsky, 2009).

    Args:
        root: Folder that contains ``cifar-10-batches-py``, or into which it is downloaded; or a folder of image files,
            ``train/<class>/`` and ``test/<class>/``.
        download: Download the archive if it is missing.
        cache: Where the images are kept during a run, see :data:`~bcos_train.dataset.base.Cache`.
        class_map: Classes of a trained model, see :data:`~bcos_train.dataset.base.ClassMap`; ``None``: the same ones.
        max_skipped: Share of images that may be unreadable, see :func:`~bcos_train.dataset.base.check_max_skipped`.
        storage, shards: Image files in ``root``, or shards, see :class:`~bcos_train.dataset.storage.shards.Shards`.
        shots, val_per_class, split_seed: A few images of each class, see :class:`~bcos_train.dataset.split.Split`.

    Raises:
        ValueError: ``root`` is None; on use: the files are missing and can't be downloaded.
    """

    name = "cifar10"
    root_variable = "DATA_ROOT"

    def __init__(
        self,
        root: str | Path | None,
        download: bool = True,
        cache: Cache | None = None,
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
            self.root = require_root(root, "CIFAR-10", "set DATA_ROOT or dataset.root")
        self.download = download
        self.cache = cache
        self.class_map = class_map
        self.max_skipped = check_max_skipped(max_skipped)
        self._split = Split(shots, val_per_class, split_seed)

    @property
    def class_names(self) -> list[str]:
        return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    @property
    def num_classes(self) -> int:
        return 10

    def prepare(self) -> None:
        """Download and unpack the archive (170 MB) if it is missing; MD5 sums are always checked."""
        if self._shards is not None:
            self._shards.prepare(self._split.parts)
            return
        if not self.download or self._as_files is not None:
            _ = self._training_images
            return
        try:
            CIFAR10(str(self.root), download=True)
        # URLError, a refused connection and a read-only folder are OSErrors.
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise ValueError(
                f"CIFAR-10 could not be downloaded to {self.root} ({' '.join(str(error).split())}): "
                f"unpack cifar-10-python.tar.gz there yourself, or set DATA_ROOT or dataset.root to a folder with it"
            ) from error

    def train(self) -> ImageDataset:
        return self._split.train(self._training_images, self.class_names)

    def val(self) -> ImageDataset:
        if self._split.val_per_class is None:
            return self._part(train=False)
        return self._split.val(self._training_images, self.class_names)

    @cached_property
    def _training_images(self) -> ImageDataset:
        return self._part(train=True)

    @cached_property
    def _as_files(self) -> ImageFolder | None:
        """The data set as image files, if the folder contains them."""
        if not (self.root / "train" / self.class_names[0]).is_dir():
            return None
        folder = ImageFolder(self.root, train="train", val="test")
        if folder.class_names != self.class_names:
            raise ValueError(f"the classes in {self.root}/train are not those of CIFAR-10: use dataset=imagefolder")
        return folder

    def _part(self, train: bool) -> ImageDataset:
        if self._shards is not None:
            names = {name: label for label, name in enumerate(self.class_names)}
            return self._shards.images("train" if train else "val", lambda: names, self.num_classes)
        if self._as_files is not None:
            return self._as_files.train() if train else self._as_files.val()
        try:
            return CIFAR10(str(self.root), train=train)
        except RuntimeError as error:
            raise ValueError(
                f"no complete CIFAR-10 in {self.root} (expected cifar-10-batches-py/): "
                f"set DATA_ROOT or dataset.root to the folder that contains it, or dataset.download=true"
            ) from error
