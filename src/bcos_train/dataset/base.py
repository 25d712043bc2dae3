"""What a data set is to the rest of the project."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from PIL import Image
from torch.utils.data import Dataset

__all__ = ["Cache", "ImageDataset", "ImageSource", "check_cache", "require_root"]

ImageDataset = Dataset[tuple[Image.Image, int]]
"""Map-style: index -> (RGB image, label in [0, num_classes))."""

Cache = Literal["device"]
"""Where a data set is kept during a run: as one tensor on each training device (see ``DeviceCache``)."""


class ImageSource(Protocol):
    """A data set with a training and a validation part.

    ``prepare`` (download, unpack) runs once, on one process, before anything else is asked for.

    A source may have an attribute ``cache``; ``"device"`` keeps the images on the training device.
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


def check_cache(cache: str | None) -> None:
    """Check the argument ``cache`` of a source.

    Raises:
        ValueError: for anything but "device" and None.
    """
    if cache not in ("device", None):
        raise ValueError(f"cache must be 'device' or None, not {cache!r}")
