"""CIFAR-10 from its official archive, or from a folder of image files."""

from __future__ import annotations

import tarfile
from functools import cached_property
from pathlib import Path

from torchvision.datasets import CIFAR10

from bcos_train.dataset.base import Cache, ImageDataset, check_cache, require_root
from bcos_train.dataset.folder import ImageFolder

__all__ = ["Cifar10"]


class Cifar10:
    """60,000 colour images of 32×32 in 10 classes, 50,000 of them for training (Krizhevsky, 2009).

    Args:
        root: folder that holds ``cifar-10-batches-py``, or will after the download; or one with the images as files,
            ``train/<class>/`` and ``test/<class>/``.
        download: fetch the archive if it is not there.
        cache: "device" keeps all images as one uint8 tensor on each training device, and loads and augments batches
            there, without loading processes. Results are the same bit for bit. The images must fit, be of one size, and
            have no random transform but ``RandomCrop`` and ``RandomHorizontalFlip``.

    Raises:
        ValueError: if root is None; later if the files are neither there nor to be had.
    """

    name = "cifar10"

    def __init__(self, root: str | Path | None, download: bool = True, cache: Cache | None = None) -> None:
        check_cache(cache)
        self.root = require_root(root, "CIFAR-10", "set DATA_ROOT or dataset.root")
        self.download = download
        self.cache = cache

    @property
    def class_names(self) -> list[str]:
        return ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

    @property
    def num_classes(self) -> int:
        return 10

    def prepare(self) -> None:
        """Download and unpack (170 MB) unless the files are there; their MD5 sums are checked in any case."""
        if not self.download or self._as_files is not None:
            self._part(train=True)
            return
        try:
            CIFAR10(str(self.root), download=True)
        # URLError, a refused connection and a folder that cannot be written are OSErrors.
        except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
            raise ValueError(
                f"CIFAR-10 could not be downloaded to {self.root} ({' '.join(str(error).split())}): "
                f"unpack cifar-10-python.tar.gz there by hand, or set DATA_ROOT or dataset.root to a folder that has it"
            ) from error

    def train(self) -> ImageDataset:
        return self._part(train=True)

    def val(self) -> ImageDataset:
        return self._part(train=False)

    @cached_property
    def _as_files(self) -> ImageFolder | None:
        """The images as files, if that is what the folder holds."""
        if not (self.root / "train" / self.class_names[0]).is_dir():
            return None
        folder = ImageFolder(self.root, train="train", val="test", hint="set DATA_ROOT or dataset.root")
        if folder.class_names != self.class_names:
            raise ValueError(f"{self.root}/train has other classes than CIFAR-10: take dataset=imagefolder")
        return folder

    def _part(self, train: bool) -> ImageDataset:
        if self._as_files is not None:
            return self._as_files.train() if train else self._as_files.val()
        try:
            return CIFAR10(str(self.root), train=train)
        except RuntimeError as error:
            raise ValueError(
                f"no complete CIFAR-10 in {self.root} (expected cifar-10-batches-py/): "
                f"set DATA_ROOT or dataset.root to the folder that holds it, or dataset.download=true"
            ) from error
