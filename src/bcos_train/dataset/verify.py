"""Check all images of a data set before a long run."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bcos_train.dataset.base import ImageDataset, ImageSource, Label
from bcos_train.dataset.image import UnreadableImage
from bcos_train.dataset.storage.tar_index import BadShard
from bcos_train.dataset.subset import path_of

__all__ = ["Report", "verify"]

#: Images per message between processes.
_BATCH = 64
#: Samples of one kind in a report.
MAX_LISTED = 1000


class _Finding(NamedTuple):
    """What is found about one image: its digest (None if it can't be read), labels, name, and what is wrong."""

    digest: bytes | None
    labels: tuple[int, ...]
    name: str
    problem: str | None


#: JSON: what :func:`verify` finds.
Report = dict[str, object]


def verify(source: ImageSource, num_workers: int = 0, on_images: Callable[[int, int], None] | None = None) -> Report:
    """Read and decode every image.

    Args:
        source: The data set.
        num_workers: Processes that read images; 0: this one.
        on_images: Called with the number of images that are checked, and of all images.

    Returns:
        ``{"dataset", "problems", "parts", "overlap"}``: the number of problems; for each part the number of images,
        images of each class, unreadable images with the reason, and groups of files with the same content; groups of
        equal files in both parts. Lists end after 1,000 entries.
    """
    parts = {"train": source.train(), "val": source.val()}
    total = sum(_length(images) for images in parts.values())
    digests: dict[str, dict[bytes, list[str]]] = {}
    content: dict[str, object] = {}
    done, problems = 0, 0
    for part, images in parts.items():
        found: dict[bytes, list[str]] = defaultdict(list)
        classes: Counter[int] = Counter()
        unreadable: list[dict[str, str]] = []
        for finding in _findings(images, num_workers):
            classes.update(finding.labels)
            if finding.digest is None:
                unreadable.append({"image": finding.name, "problem": str(finding.problem)})
            else:
                found[finding.digest].append(finding.name)
            done += 1
            if on_images is not None and (done % _BATCH == 0 or done == total):
                on_images(done, total)
        duplicates = [names for names in found.values() if len(names) > 1]
        problems += len(unreadable) + len(duplicates)
        digests[part] = found
        content[part] = {
            "images": _length(images),
            "classes": {name: classes[label] for label, name in enumerate(source.class_names) if classes[label]},
            "unreadable": unreadable[:MAX_LISTED],
            "duplicates": duplicates[:MAX_LISTED],
            "n_unreadable": len(unreadable),
            "n_duplicates": len(duplicates),
        }
    overlap = _overlap(digests["train"], digests["val"])
    return {
        "dataset": source.name,
        "problems": problems + len(overlap),
        "parts": content,
        "overlap": overlap[:MAX_LISTED],
        "n_overlap": len(overlap),
    }


def _overlap(train: Mapping[bytes, list[str]], val: Mapping[bytes, list[str]]) -> list[dict[str, list[str]]]:
    return [{"train": train[digest], "val": names} for digest, names in val.items() if digest in train]


def _findings(images: ImageDataset, num_workers: int) -> Iterable[_Finding]:
    loader = DataLoader(
        _Checked(images),
        batch_size=_BATCH,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=_single_threaded,
    )
    for findings in loader:
        yield from findings


def _single_threaded(worker: int) -> None:
    torch.set_num_threads(1)


class _Checked(Dataset[_Finding]):
    """What is found about each image."""

    def __init__(self, images: ImageDataset) -> None:
        self._images = images

    def __len__(self) -> int:
        return _length(self._images)

    def __getitem__(self, index: int) -> _Finding:
        name = path_of(self._images, index) or f"image {index}"
        try:
            image, label, *_ = self._images[index]
        except (UnreadableImage, BadShard) as error:
            return _Finding(None, (), name, str(error))
        # Of the pixels, not of the file: copies of an image with other metadata are the same to a network.
        digest = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        return _Finding(digest, _labels(label), name, None)


def _length(images: ImageDataset) -> int:
    return len(images)  # type: ignore[arg-type]  # map-style data sets have a length


def _labels(label: Label) -> tuple[int, ...]:
    return tuple(np.flatnonzero(label).tolist()) if isinstance(label, np.ndarray) else (int(label),)
