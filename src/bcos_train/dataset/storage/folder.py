"""Images in a file system: ``<part>/<class>/…``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader

__all__ = ["FolderImages", "UnreadableImage", "list_classes", "shorten"]


class FolderImages(Dataset[tuple[Image.Image, int]]):
    """The images under ``folder/<class>/``, at any depth, sorted by class and path.

    Gray, palette and CMYK images become RGB.

    Args:
        class_to_index: Label of every class folder.
        hint: How to set the folder, for error messages.
        decode: Path -> RGB image.

    Raises:
        ValueError: A class has no image.
        UnreadableImage: On access: an image can't be read.
    """

    def __init__(
        self, folder: Path, class_to_index: dict[str, int], hint: str, decode: Callable[[str], Image.Image] = pil_loader
    ) -> None:
        try:
            samples = make_dataset(str(folder), class_to_index, extensions=IMG_EXTENSIONS)
        except FileNotFoundError as error:
            empty = [name for name in class_to_index if not _has_images(folder / name)]
            raise ValueError(
                f"{folder} has no images ({', '.join(ext[1:] for ext in IMG_EXTENSIONS)}) in the class folders "
                f"{shorten(empty)}: {hint}"
            ) from error
        # Arrays instead of a list of tuples: updates of a million reference counts would copy the list's memory pages
        # in every worker process.
        self._paths = np.array([os.fsencode(os.path.relpath(path, folder)) for path, _ in samples])
        self._folder = str(folder)
        self._decode = decode
        self.labels = np.array([label for _, label in samples], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(bytes(self._paths[index])))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self.path(index)
        try:
            return self._decode(path), int(self.labels[index])
        # Depending on the format, Pillow raises any of these for a damaged file.
        except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:
            raise UnreadableImage(f"cannot read the image {path}: {error}") from error


class UnreadableImage(ValueError):
    """A file with an image's extension is not an image, or is damaged."""


def list_classes(root: Path, part: str, key: str, hint: str) -> list[str]:
    """Return the names of the class folders in ``root/part``, sorted, without hidden ones.

    Args:
        key: Config key of the part's name, for error messages.
        hint: How to set the folder, for error messages.

    Raises:
        ValueError: The folder doesn't exist or contains no class.
    """
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}: {hint}")
    folder = root / part
    if not folder.is_dir():
        folders = shorten(_subfolders(root))
        raise ValueError(f"{root} has no folder {part}/ (it has: {folders}): {hint}, or {key} to the folder's name")
    classes = _subfolders(folder)
    if not classes:
        flat = any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.iterdir())
        state = "its images are not in class folders" if flat else "it has no class folders"
        raise ValueError(f"{folder} must contain one folder per class, but {state}: {hint}")
    return classes


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _has_images(folder: Path) -> bool:
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))


def shorten(names: list[str], limit: int = 5) -> str:
    """Join the first names for an error message."""
    shown = ", ".join(names[:limit]) or "none"
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown
