"""What a data set is to the rest of the project."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from PIL import Image
from torch.utils.data import Dataset

__all__ = ["ImageDataset", "ImageSource", "require_root"]

ImageDataset = Dataset[tuple[Image.Image, int]]
"""Map-style: index -> (RGB image, label in [0, num_classes))."""


class ImageSource(Protocol):
    """A data set with a training and a validation part.

    ``prepare`` (download, unpack) runs once, on one process, before anything else is asked for.
    """

    name: str

    @property
    def class_names(self) -> list[str]: ...

    @property
    def num_classes(self) -> int: ...

    def prepare(self) -> None: ...

    def train(self) -> ImageDataset: ...

    def val(self) -> ImageDataset: ...


def require_root(root: str | Path | None, what: str, hint: str) -> Path:
    """The root folder as a path.

    Raises:
        ValueError: if it is None or empty, with the hint what to set.
    """
    if root is None or not str(root):
        raise ValueError(f"where is {what}? No folder is given: {hint}")
    return Path(root).expanduser()
