"""Record which images a data set consists of, to notice changes between stop and resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

from bcos_train.dataset.base import ImageDataset
from bcos_train.dataset.subset import whole_dataset

__all__ = ["Inventory", "OtherImages", "check_same_images", "take_inventory"]

_PARTS = {"train": "training", "val": "validation"}


class PartInventory(TypedDict):
    """Number of images, and the hash of their names if the data set has one."""

    count: int
    digest: str | None


#: By part: ``"train"`` and ``"val"``.
Inventory = Mapping[str, PartInventory]


class OtherImages(ValueError):
    """The images of a data set are not those that a run was started with."""


def take_inventory(train: ImageDataset, val: ImageDataset) -> Inventory:
    """Return the number of images in each part and, if the data set has a method ``digest``, the hash of their names.

    Of a subset, it is that of the whole data set, from which the subset was drawn.
    """
    return {"train": _part(train), "val": _part(val)}


def _part(images: ImageDataset) -> PartInventory:
    whole, _ = whole_dataset(images)
    digest = getattr(whole, "digest", None)
    return {"count": len(whole), "digest": None if digest is None else digest()}  # type: ignore[arg-type]


def check_same_images(dataset: Inventory, recorded: Inventory) -> None:
    """Raise :class:`OtherImages` unless two inventories are equal.

    Args:
        dataset: That of the current data set.
        recorded: That of a checkpoint.
    """
    changes = []
    for part, name in _PARTS.items():
        now, before = dataset[part], recorded[part]
        if now["count"] != before["count"]:
            changes.append(f"{now['count']:,} instead of {before['count']:,} {name} images")
        elif now["digest"] != before["digest"]:
            changes.append(f"other names or classes among the {now['count']:,} {name} images")
    if changes:
        raise OtherImages(
            f"dataset: the images changed since the last checkpoint: {', '.join(changes)}; restore them, use "
            "resume=data_changed to continue with the new ones, or resume=false to train again in a new folder"
        )
