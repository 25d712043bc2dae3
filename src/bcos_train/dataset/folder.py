"""Image folders: ``root/<part>/<class>/…``."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader

from bcos_train.dataset.base import Cache, ImageDataset, check_cache, require_root

__all__ = ["FolderImages", "ImageFolder", "list_classes"]


class FolderImages(Dataset[tuple[Image.Image, int]]):
    """The images under ``folder/<class>/``, at any depth, sorted by class and path.

    Grey, palette and CMYK images become RGB.

    Args:
        class_to_index: the label of every class folder.
        hint: what to set if something is wrong, for the error.

    Raises:
        ValueError: if a class has no image; on access, naming the file, if one cannot be read.
    """

    def __init__(self, folder: Path, class_to_index: dict[str, int], hint: str) -> None:
        try:
            samples = make_dataset(str(folder), class_to_index, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            empty = [name for name in class_to_index if not _has_images(folder / name)]
            raise ValueError(
                f"{folder} has no images ({', '.join(ext[1:] for ext in IMG_EXTENSIONS)}) in the class folders "
                f"{_some(empty)}: {hint}"
            ) from error
        # Arrays, not a list of tuples: the reference counts of a million objects would make every worker copy them.
        self._paths = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in samples])
        self._folder = str(folder)
        self.labels = np.array([label for _, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(bytes(self._paths[index])))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.path(index)
        try:
            return pil_loader(path), int(self.labels[index])
        # Pillow reports damage by any of these, depending on the format.
        except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
            raise UnreadableImage(f"cannot read the image {path}: {error}") from error


class UnreadableImage(ValueError):
    """A file with the name of an image that is none, or a damaged one."""


class ImageFolder:
    """Your own images, in one folder a class: ``root/train/<class>/…`` and ``root/val/<class>/…``.

    Args:
        root: the folder that holds both parts.
        train: folder name of the training part; may be the same as ``val`` to try things on a small sample.
        val: folder name of the validation part, for instance "test".
        hint: what to set if something is wrong, for the error messages.
        cache: "device" keeps all images as one uint8 tensor on each training device, and loads and augments batches
            there, without loading processes. Results are the same bit for bit. The images must fit, be of one size, and
            have no random transform but ``RandomCrop`` and ``RandomHorizontalFlip``.

    Raises:
        ValueError: if root is None; on use if folders are missing or empty, or if the parts differ in their classes.
    """

    name = "imagefolder"

    def __init__(
        self,
        root: str | Path | None,
        train: str = "train",
        val: str = "val",
        hint: str = "set DATA_ROOT or dataset.root",
        cache: Cache | None = None,
    ) -> None:
        check_cache(cache)
        self.root = require_root(root, "the image folder", hint)
        self.hint = hint
        self.cache = cache
        self.train_folder = train
        self.val_folder = val

    @cached_property
    def class_names(self) -> list[str]:
        """The names of the class folders of the validation part, sorted; a class's label is its place in the list."""
        return list_classes(self.root, self.val_folder, "dataset.val", self.hint)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def prepare(self) -> None:
        """Check that the folders are there."""
        _ = self.class_names

    def train(self) -> ImageDataset:
        classes = list_classes(self.root, self.train_folder, "dataset.train", self.hint)
        if classes != self.class_names:
            only_train = sorted(set(classes) - set(self.class_names))
            only_val = sorted(set(self.class_names) - set(classes))
            raise ValueError(
                f"{self.root / self.train_folder} and {self.root / self.val_folder} must have the same class folders; "
                f"only in {self.train_folder}: {_some(only_train)}, only in {self.val_folder}: {_some(only_val)}; "
                f"{self.hint}"
            )
        return self._part(self.train_folder)

    def val(self) -> ImageDataset:
        return self._part(self.val_folder)

    def _part(self, part: str) -> FolderImages:
        labels = {name: label for label, name in enumerate(self.class_names)}
        return FolderImages(self.root / part, labels, self.hint)


def list_classes(root: Path, part: str, key: str, hint: str) -> list[str]:
    """The class folders of ``root/part``, sorted; hidden ones do not count.

    Args:
        key: the configuration key that names the part, for the error.

    Raises:
        ValueError: if there is no such folder or no class in it.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: {hint}")
    folder = root / part
    if not folder.is_dir():
        others = _some(_subfolders(root))
        raise ValueError(f"{root} has no folder {part}/ (it has: {others}): {hint}, or {key} to the folder's name")
    classes = _subfolders(folder)
    if not classes:
        flat = any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.iterdir())
        state = "its images are not sorted into class folders" if flat else "it is empty of class folders"
        raise ValueError(f"{folder} must hold one folder a class, but {state}: {hint}")
    return classes


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))


def _some(names: list[str], limit: int = 5) -> str:
    """A few of the names, for an error message."""
    shown = ", ".join(names[:limit]) or "none"
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown
