"""Images in a file system: ``<part>/<class>/…``.

Which files are data, on all levels:

* Files with the extensions of torchvision's ``ImageFolder``: .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp.
* Hidden files and folders, whose name begins with a dot (``._*`` of macOS, ``.ipynb_checkpoints``), and those that
  operating systems leave behind (``__MACOSX``, ``@eaDir``, ``Thumbs.db``, …) are neither data nor classes.

What is left out is counted in one line.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from bcos_train.dataset.image import read_image
from bcos_train.utils.terminal import printable

__all__ = ["FolderImages", "list_classes", "shorten"]

_logger = logging.getLogger(__name__)

#: Files and folders of operating systems whose names don't begin with a dot, in lower case.
_SYSTEM_FILES = frozenset(
    {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
)
_HIDDEN, _OUTSIDE = "hidden or system files", "images outside of class folders"


class FolderImages(Dataset[tuple[Image.Image, int]]):
    """The images under ``folder/<class>/``, at any depth, sorted by class and path.

    Args:
        class_to_index: Label of every class folder.
        hint: How to set the folder, for error messages.
        exif_orientation: As for :func:`~bcos_train.dataset.image.to_rgb`.

    Raises:
        ValueError: A class has no image.
        UnreadableImage: On access: an image can't be read, or has no defined conversion to RGB.
    """

    def __init__(self, folder: Path, class_to_index: dict[str, int], hint: str, exif_orientation: bool = False) -> None:
        left_out = _left_out_beside_classes(folder)
        paths: list[bytes] = []
        labels: list[int] = []
        empty: list[str] = []
        for name in sorted(class_to_index):
            before = len(paths)
            # Relative paths: those of a million images are held by every worker process.
            paths += (os.fsencode(os.path.relpath(path, folder)) for path in _images(folder / name, left_out))
            labels += [class_to_index[name]] * (len(paths) - before)
            if len(paths) == before:
                empty.append(name)
        if empty:
            files = f"; it has {_describe(left_out)}" if left_out else ""
            raise ValueError(
                f"{folder} has no images ({_extensions()}) in the class folders {shorten(empty)}{files}: {hint}"
            )
        if left_out:
            _logger.warning("%s: left out %s", printable(str(folder)), printable(_describe(left_out)))
        # Arrays instead of a list of tuples: updates of a million reference counts would copy the list's memory pages
        # in every worker process.
        self._paths = np.array(paths)
        self._folder = str(folder)
        self._exif_orientation = exif_orientation
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Return a hash of the relative paths and the labels of all images, in less than 0.1 s for a million."""
        content = hashlib.sha256(self._paths.tobytes())
        content.update(self.labels.tobytes())
        return content.hexdigest()

    def path(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(bytes(self._paths[index])))

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path(index), self._exif_orientation), int(self.labels[index])


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
        is_flat = _OUTSIDE in _left_out_beside_classes(folder)
        state = "its images are not in class folders" if is_flat else "it has no class folders"
        raise ValueError(f"{folder} must contain one folder per class, but {state}: {hint}")
    return classes


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not _is_hidden(entry.name))


def _images(folder: Path, left_out: Counter[str]) -> Iterator[str]:
    """Yield the paths of the images under a class folder, sorted by folder and name as by torchvision.

    Args:
        left_out: Receives the numbers of files and folders that are left out, by reason.
    """
    visited = []
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        visible = [name for name in folders if not _is_hidden(name)]
        if len(visible) < len(folders):
            left_out[_HIDDEN] += len(folders) - len(visible)
        folders[:] = visible
        visited.append((parent, files))
    for parent, files in sorted(visited):
        for name in sorted(files):
            if (reason := _reason(name)) is None:
                yield os.path.join(parent, name)
            else:
                left_out[reason] += 1


def _raise(error: OSError) -> None:
    raise error  # os.walk skips folders that can't be read, without a word


def _left_out_beside_classes(folder: Path) -> Counter[str]:
    """Count what is left out of a folder that contains the class folders, by reason."""
    left_out: Counter[str] = Counter()
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                left_out[_HIDDEN] += 1
            elif not entry.is_dir():
                left_out[_reason(entry.name) or _OUTSIDE] += 1
    return left_out


def _reason(name: str) -> str | None:
    """Return why a file is not data, as its kind; None for an image."""
    if _is_hidden(name):
        return _HIDDEN
    suffix = os.path.splitext(name)[1].lower()
    if suffix in IMG_EXTENSIONS:
        return None
    return suffix if suffix[1:].isascii() and suffix[1:].isalnum() else "other"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def _extensions() -> str:
    return ", ".join(extension[1:] for extension in IMG_EXTENSIONS)


def _describe(left_out: Counter[str]) -> str:
    """Describe what was left out, with counts, images outside class folders first."""
    parts = [f"{left_out[kind]} {kind}" for kind in (_OUTSIDE, _HIDDEN) if left_out[kind]]
    foreign = sorted((kind for kind in left_out if kind not in (_OUTSIDE, _HIDDEN)), key=lambda k: -left_out[k])
    if foreign:
        counts = shorten([f"{left_out[kind]} {kind}" for kind in foreign])
        parts.append(f"files in other formats than {_extensions()}: {counts}")
    return "; ".join(parts)


def shorten(names: list[str], limit: int = 5) -> str:
    """Join the first names for an error message."""
    shown = ", ".join(names[:limit]) or "none"
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown
