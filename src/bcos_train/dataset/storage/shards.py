"""Images in tar files (WebDataset shards), read by random access.

The position of each image is looked up in an index, so that the samplers of image files apply: global shuffling, exact
epochs and exact resume. The images of a part have the order of the shards' names and of the files in them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args
from zipfile import BadZipFile

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from bcos_train.dataset.image import read_encoded
from bcos_train.dataset.storage.folder import shorten
from bcos_train.dataset.storage.tar_index import BadShard, index_tar
from bcos_train.utils.atomic import atomic_write
from bcos_train.utils.cores import usable_cores
from bcos_train.utils.suggestions import join_words, suggest
from bcos_train.utils.terminal import printable

__all__ = ["MANIFEST", "ShardImages", "Shards", "Storage", "choose_shards", "find_shards"]

_logger = logging.getLogger(__name__)

Storage = Literal["folder", "shards"]
"""Where the images of a data set are: one file for each, or tar files."""

#: Written beside the shards by ``scripts/make_shards.py``.
MANIFEST = "manifest.json"
FORMATS = ("JPEG", "PNG", "WEBP")
#: Smallest number of shards that are indexed by several processes, which take seconds to start.
_MIN_SHARDS_FOR_PROCESSES = 64
#: Files that a process keeps open.
_MAX_OPEN = 64


@dataclass(frozen=True)
class ShardIndex:
    """Positions of the images in shards.

    Attributes:
        shard: int64 ``(N,)``, indices in the list of shards.
        offset, length: int64 ``(N,)``, bytes.
        key: ``(N,)`` bytes, the samples' keys.
        label: int64 ``(N,)``, class indices; -1: the class is given by its name.
        name: ``(N,)`` str, class names; empty: the class is given by its index.
        incomplete: Number of samples without an image or without a label, which are left out.
    """

    shard: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    key: np.ndarray
    label: np.ndarray
    name: np.ndarray
    incomplete: np.ndarray

    def __len__(self) -> int:
        return len(self.offset)

    @classmethod
    def read(cls, paths: Sequence[Path]) -> ShardIndex:
        """Read the index of shards; it is kept in the user's cache folder as long as names, sizes and times are equal.

        Raises:
            BadShard: See :func:`~bcos_train.dataset.storage.tar_index.index_tar`.
        """
        cache = _cache_folder() / f"{_fingerprint(paths)}.npz"
        try:
            with cache.open("rb") as file, np.load(file) as arrays:
                return cls(**arrays)
        except (OSError, ValueError, TypeError, BadZipFile):  # none yet, damaged, or of another version
            index = cls._build(paths)
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache) as temporary, temporary.open("wb") as output:
                np.savez(output, **vars(index))
        except OSError as error:
            _logger.warning("the index of the shards could not be kept in %s: %s", cache.parent, error.strerror)
        return index

    @classmethod
    def _build(cls, paths: Sequence[Path]) -> ShardIndex:
        processes = min(usable_cores(), 16)
        if len(paths) < _MIN_SHARDS_FOR_PROCESSES or processes < 2:
            tars = [index_tar(path) for path in paths]
        else:
            with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
                tars = list(pool.map(index_tar, paths, chunksize=4))
        every = [(shard, sample) for shard, samples in enumerate(tars) for sample in samples]
        rows = [(shard, sample) for shard, sample in every if sample.length and sample.label is not None]
        is_name = [isinstance(sample.label, str) for _, sample in rows]
        return cls(
            shard=np.array([shard for shard, _ in rows], dtype=np.int64),
            offset=np.array([sample.offset for _, sample in rows], dtype=np.int64),
            length=np.array([sample.length for _, sample in rows], dtype=np.int64),
            key=np.array([os.fsencode(sample.key) for _, sample in rows], dtype=np.bytes_),
            label=np.array([-1 if n else s.label for n, (_, s) in zip(is_name, rows, strict=True)], dtype=np.int64),
            name=np.array([s.label if n else "" for n, (_, s) in zip(is_name, rows, strict=True)], dtype=np.str_),
            incomplete=np.array(len(every) - len(rows)),
        )


class ShardImages(Dataset[tuple[Image.Image, int]]):
    """The images of one part, in order.

    Args:
        paths: The shards.
        index: Their index.
        class_to_index: Label of each class name that may occur in the shards.
        num_classes: K; class indices in the shards are below.
        exif_orientation: As for :func:`~bcos_train.dataset.image.to_rgb`.

    Raises:
        ValueError: A class is unknown.
        BadShard: On access: a shard has disappeared.
        UnreadableImage: On access: an image can't be read, or has no defined conversion to RGB.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        index: ShardIndex,
        class_to_index: Mapping[str, int],
        num_classes: int,
        exif_orientation: bool = False,
    ) -> None:
        self._paths = [str(path) for path in paths]
        self._index = index
        self._exif_orientation = exif_orientation
        self.labels = self._labels(class_to_index, num_classes)
        self._files: dict[int, int] = {}
        if index.incomplete:
            folder = printable(str(paths[0].parent))
            _logger.warning("%s: left out %d samples without an image or a class", folder, index.incomplete)

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Return a hash of the keys, sizes and labels of all images."""
        content = hashlib.sha256(self._index.key.tobytes())
        content.update(self._index.length.tobytes())
        content.update(self.labels.tobytes())
        return content.hexdigest()

    def path(self, index: int) -> str:
        """Return the shard and the key of an image, for messages."""
        return f"{self._paths[self._index.shard[index]]}:{os.fsdecode(bytes(self._index.key[index]))}"

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content = self.encoded(index)
        return read_encoded(content, self.path(index), FORMATS, self._exif_orientation), int(self.labels[index])

    def encoded(self, index: int) -> bytes:
        """Return the content of an image file.

        Raises:
            BadShard: The shard can't be read, or has become shorter.
        """
        shard, length = int(self._index.shard[index]), int(self._index.length[index])
        try:
            content = os.pread(self._file(shard), length, int(self._index.offset[index]))
        except OSError as error:
            raise BadShard(f"{self._paths[shard]}: {error.strerror}") from error
        if len(content) < length:
            raise BadShard(f"{self._paths[shard]}: cut in {self.path(index)!r}, it was longer at the start")
        return content

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= _MAX_OPEN:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_files": {}}  # open files stay in their process

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            os.close(file)

    def _labels(self, class_to_index: Mapping[str, int], num_classes: int) -> np.ndarray:
        index = self._index
        labels = index.label.copy()
        names, inverse = np.unique(index.name, return_inverse=True)
        for position, name in enumerate(names.tolist()):
            if not name:
                continue
            if name not in class_to_index:
                first = int(np.flatnonzero(inverse == position)[0])
                raise ValueError(f"{self.path(first)}: unknown class {name!r}{suggest(name, list(class_to_index))}")
            labels[inverse == position] = class_to_index[name]
        if len(wrong := np.flatnonzero((labels < 0) | (labels >= num_classes))):
            first = int(wrong[0])
            raise ValueError(f"{self.path(first)}: class {labels[first]}, the data set has {num_classes} classes")
        return labels


class Shards:
    """The shards of a data set.

    Args:
        location: A folder with shards ``<part>-*.tar``, or the shards of each part: ``{train: …, val: …}`` with paths
            in which ``{000000..000099}`` and ``*`` are expanded.

    Raises:
        ValueError: On use: there are no such shards.
    """

    def __init__(self, location: str | Mapping[str, str]) -> None:
        self.location = location
        self._indices: dict[str, tuple[list[Path], ShardIndex]] = {}

    def paths(self, part: str) -> list[Path]:
        """Return the shards of a part, sorted by name."""
        if isinstance(self.location, Mapping):
            if part not in self.location:
                raise ValueError(f"dataset.shards has no part {part!r}{suggest(part, list(self.location))}")
            return find_shards(self.location[part])
        folder = Path(self.location).expanduser()
        if not folder.is_dir():
            raise ValueError(f"dataset.shards: there is no folder {folder}")
        paths = sorted(folder.glob(f"{part}-*.tar"))
        if not paths:
            parts = sorted({path.name.rpartition("-")[0] or path.name for path in folder.glob("*.tar")})
            raise ValueError(f"dataset.shards: {folder} has no shards {part}-*.tar (it has: {shorten(parts)})")
        self._check_complete(part, paths)
        return paths

    @cached_property
    def manifest(self) -> Mapping[str, object] | None:
        """The manifest in the folder; ``None``: there is none."""
        if isinstance(self.location, Mapping):
            return None
        path = Path(self.location).expanduser() / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a manifest of shards ({' '.join(str(error).split())})") from error
        return content if isinstance(content, dict) else None

    def prepare(self, parts: Iterable[str]) -> None:
        """Read the index of these parts, which other processes then find in the cache."""
        for part in parts:
            self.index(part)

    def index(self, part: str) -> tuple[list[Path], ShardIndex]:
        """Return the shards of a part with their index."""
        if part not in self._indices:
            paths = self.paths(part)
            self._indices[part] = paths, ShardIndex.read(paths)
        return self._indices[part]

    def images(
        self,
        part: str,
        class_to_index: Callable[[], Mapping[str, int]],
        num_classes: int,
        exif_orientation: bool = False,
    ) -> ShardImages:
        """Return the images of a part.

        Args:
            class_to_index: Returns the label of each class name; called if the shards have class names.
            num_classes, exif_orientation: As for :class:`ShardImages`.
        """
        paths, index = self.index(part)
        names = class_to_index() if index.name.any() else {}
        return ShardImages(paths, index, names, num_classes, exif_orientation)

    def class_names(self, part: str) -> list[str]:
        """Return the class names in the manifest; without one those in the shards, sorted, or else the indices."""
        names = (self.manifest or {}).get("class_names")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return list(names)
        _, index = self.index(part)
        if (index.label < 0).all():
            return sorted(set(index.name.tolist()))
        return [str(label) for label in range(int(index.label.max()) + 1)]

    def _check_complete(self, part: str, paths: Sequence[Path]) -> None:
        """Raise a ValueError if the manifest lists other shards or sizes."""
        parts = (self.manifest or {}).get("parts")
        if not isinstance(parts, dict) or part not in parts:
            return
        expected = {shard["name"]: shard["bytes"] for shard in parts[part]["shards"]}
        found = {path.name: path.stat().st_size for path in paths}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                have = f"{found[name]:,} bytes" if name in found else "missing"
                want = f"{expected[name]:,} bytes" if name in expected else "no such shard"
                raise ValueError(f"dataset.shards: {paths[0].parent / name} is {have}, {MANIFEST} says {want}")


def choose_shards(storage: Storage, shards: str | Mapping[str, str] | None) -> Shards | None:
    """Return the shards of a data set, or None if it is stored in another way.

    Args:
        storage: ``dataset.storage``.
        shards: ``dataset.shards``.

    Raises:
        ValueError: The keys contradict each other.
    """
    if storage not in get_args(Storage):
        raise ValueError(f"storage={storage}: {join_words(get_args(Storage))}{suggest(storage, get_args(Storage))}")
    if storage == "folder":
        if shards is not None:
            raise ValueError("shards is for storage=shards")
        return None
    if shards is None:
        raise ValueError("storage=shards: set dataset.shards to the folder of the shards, or {train: …, val: …}")
    return Shards(shards)


def find_shards(pattern: str) -> list[Path]:
    """Return the shards of a pattern with braces (``{000000..000099}``) and wildcards, sorted by name within each.

    Raises:
        ValueError: There are none.
    """
    from braceexpand import braceexpand  # not among the dependencies of models and explanations

    found: list[Path] = []
    for path in map(os.path.expanduser, braceexpand(pattern)):
        if any(character in path for character in "*?["):
            parent, name = os.path.split(path)
            matches = sorted(Path(parent).glob(name))
        else:
            matches = [Path(path)] if os.path.isfile(path) else []
        if not matches:
            raise ValueError(f"dataset.shards: there is no file {path}")
        found += matches
    return found


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bcos-train" / "shards"


def _fingerprint(paths: Sequence[Path]) -> str:
    content = hashlib.sha256(b"1")  # version of the index
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise BadShard(f"{path}: {error.strerror}") from error
        content.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return content.hexdigest()[:32]
