"""A teacher's logits and explanation maps on disk, computed once for each image.

A store is a folder:

* ``manifest.json``: what was computed, and size and SHA-256 of each shard.
* ``<part>-indices.npy``: int64 (M,), index of each image in the whole data set.
* ``<part>-00000.npy`` …: shards, arrays of records with label, logits (K,) in float32 and map (C, h, w).

Parts are ``train`` and ``val``. All files are plain arrays: any number of processes can read any record. Maps are
divided by a power of two, so that the largest value lies in [0.5, 1): float16 neither overflows nor loses small maps. A
cosine doesn't depend on the factor.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from bcos_train.distillation.options import ExplanationKind
from bcos_train.utils.atomic import atomic_write
from bcos_train.utils.files import file_sha256, write_json

__all__ = ["MANIFEST", "PARTS", "Manifest", "MapDtype", "Part", "PartInfo", "Store", "UnreadableMaps", "scale_maps"]

MANIFEST = "manifest.json"
FORMAT, VERSION = "bcos-train teacher maps", 1
MapDtype = Literal["float16", "float32"]
Part = Literal["train", "val"]
PARTS = get_args(Part)
#: Largest size of a shard: what is computed again after an interruption.
SHARD_IMAGES, SHARD_BYTES = 4096, 2**28


@dataclass(frozen=True)
class Shard:
    """Size in bytes and SHA-256 of a shard's file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PartInfo:
    """Images of a part and the view of them that the teacher saw.

    Args:
        count: Number of images M.
        view: Transform, as text.
        inventory: Number and digest of the whole data set's images, see :mod:`bcos_train.dataset.inventory`.
        samples: Index, label, height, width and mean red, green and blue of some images in this view.
        indices_sha256: Of the file with the indices.
        map_shape: (C, h, w).
        shard_images: Images per shard.
    """

    count: int
    view: str
    inventory: Mapping[str, int | str | None]
    samples: list[list[float]]
    indices_sha256: str
    map_shape: tuple[int, int, int]
    shard_images: int

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_images)

    def batches(self, shard: int, size: int) -> list[list[int]]:
        """Return the indices of a shard in batches of at most ``size``."""
        begin, end = shard * self.shard_images, min((shard + 1) * self.shard_images, self.count)
        return [list(range(i, min(i + size, end))) for i in range(begin, end, size)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds.

    Args:
        teacher: Name and origin of the weights.
        teacher_sha256: Of the teacher's state dict.
        teacher_precision: ``"bf16"`` or ``None``.
        explanation: Kind of maps, of the teacher's predicted class.
        dataset, class_names: Name and classes of the data set.
        num_classes: K.
        dtype: Type of the maps.
        parts: By name.
        shards: Those that are complete, by file name.
        accuracy: Teacher's top-1 accuracy on the validation images in percent; ``None`` until everything is computed.
    """

    teacher: str
    teacher_sha256: str
    teacher_precision: str | None
    explanation: ExplanationKind
    dataset: str
    class_names: list[str]
    num_classes: int
    dtype: MapDtype
    parts: Mapping[str, PartInfo]
    shards: dict[str, Shard] = field(default_factory=dict)
    accuracy: float | None = None

    def identity(self) -> dict[str, object]:
        """Return what has to be equal to continue a computation; the teacher is identified by its weights."""
        return {key: value for key, value in asdict(self).items() if key not in ("shards", "accuracy", "teacher")}

    @property
    def sha256(self) -> str:
        """SHA-256 of everything that is stored."""
        content = {**self.identity(), "shards": {name: shard.sha256 for name, shard in sorted(self.shards.items())}}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def record(self, part: str) -> np.dtype:
        """Return the type of a part's records."""
        return record_type(self.num_classes, self.dtype, self.parts[part].map_shape)

    def files(self) -> Iterator[tuple[Part, int, str]]:
        """Yield part, number and file name of each shard."""
        for part in PARTS:
            for number in range(self.parts[part].num_shards):
                yield part, number, shard_name(part, number)

    @property
    def bytes(self) -> int:
        """Size of all shards on disk, without their headers."""
        return sum(self.record(part).itemsize * info.count for part, info in self.parts.items())

    def save(self, folder: Path) -> None:
        shards = {name: asdict(shard) for name, shard in sorted(self.shards.items())}
        content = {"format": FORMAT, "version": VERSION, **asdict(self), "shards": shards}
        write_json(folder / MANIFEST, content)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read the manifest of a store.

        Raises:
            ValueError: There is none, or it has another format.
        """
        path = folder / MANIFEST
        if not path.is_file():
            problem = f"has no {MANIFEST}" if folder.is_dir() else "no such folder"
            raise ValueError(f"{folder}: {problem}; scripts/precompute_teacher.py writes teacher maps")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            if (version := content.pop("version")) != VERSION:
                raise ValueError(f"version {version}, supported is {VERSION}")
            content["parts"] = {
                name: PartInfo(**{**part, "map_shape": tuple(part["map_shape"])})
                for name, part in content["parts"].items()
            }
            content["shards"] = {name: Shard(**shard) for name, shard in content["shards"].items()}
            if set(content["parts"]) != set(PARTS):
                raise ValueError(f"parts {', '.join(content['parts'])}")
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a manifest of teacher maps: {' '.join(str(error).split())}") from error


def shard_name(part: str, number: int) -> str:
    return f"{part}-{number:05d}.npy"


def indices_name(part: str) -> str:
    return f"{part}-indices.npy"


def record_type(num_classes: int, dtype: MapDtype, map_shape: tuple[int, int, int]) -> np.dtype:
    """Return the type of the records of a shard: label, logits (K,) and map (C, h, w)."""
    values = [("label", "<i8"), ("logits", "<f4", (num_classes,))]
    return np.dtype([*values, ("map", np.dtype(dtype).newbyteorder("<"), map_shape)])


def shard_images(record: np.dtype) -> int:
    """Return the number of images per shard."""
    return max(1, min(SHARD_IMAGES, SHARD_BYTES // record.itemsize))


class UnreadableMaps(ValueError):
    """A shard can't be read any more. The message is one line with its path."""


class Store:
    """A folder with a manifest and shards.

    Args:
        folder: Where it is.
        manifest: What it holds.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._records = {part: manifest.record(part) for part in PARTS}

    @classmethod
    def open(cls, folder: Path) -> "Store":
        """Open a complete store.

        Raises:
            ValueError: It is incomplete, or a file is missing or has another size.
        """
        store = cls(folder, Manifest.load(folder))
        missing = store.missing()
        if missing or store.manifest.accuracy is None:
            count = sum(1 for _ in store.manifest.files())
            example = f" ({folder / missing[0][2]})" if missing else ""
            raise ValueError(
                f"{folder}: {len(missing)} of {count} shards are missing or have another size{example}; run "
                "scripts/precompute_teacher.py again, which computes only these"
            )
        for part in PARTS:
            path, expected = folder / indices_name(part), store.manifest.parts[part].indices_sha256
            if not path.is_file() or file_sha256(path) != expected:
                raise ValueError(f"{path} is missing or damaged: run scripts/precompute_teacher.py again")
        return store

    def missing(self) -> list[tuple[Part, int, str]]:
        """Return the shards that are missing or don't have the recorded size."""
        shards = self.manifest.shards
        return [
            (part, number, name)
            for part, number, name in self.manifest.files()
            if name not in shards or not _has_size(self.folder / name, shards[name].bytes)
        ]

    def damaged(self) -> Iterator[tuple[str, bool]]:
        """Read all shards again; yield the name of each, and True if its SHA-256 is another than that recorded."""
        for name, shard in sorted(self.manifest.shards.items()):
            path = self.folder / name
            yield name, not path.is_file() or file_sha256(path) != shard.sha256

    def write(self, part: Part, number: int, records: np.ndarray) -> None:
        """Write a shard, then record it in the manifest."""
        path = self.folder / shard_name(part, number)
        assert records.dtype == self._records[part], "other records"
        with atomic_write(path) as temporary:
            with temporary.open("wb") as file:  # np.save would append .npy to a name
                np.save(file, records, allow_pickle=False)
            shard = Shard(temporary.stat().st_size, file_sha256(temporary))
        self.manifest.shards[path.name] = shard
        self.manifest.save(self.folder)

    def shard(self, part: Part, number: int) -> np.ndarray:
        """Return the records of a shard, memory-mapped.

        Raises:
            UnreadableMaps: The file is missing or damaged.
        """
        path = self.folder / shard_name(part, number)
        try:
            records: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UnreadableMaps(f"can't read {path}: {' '.join(str(error).split())}") from error
        if records.dtype != self._records[part]:
            raise UnreadableMaps(f"{path}: other records than {MANIFEST} says")
        return records

    def read(self, part: Part, position: int) -> np.void:
        """Return the record at a position of a part.

        Raises:
            UnreadableMaps: The file is missing or damaged.
        """
        # Opened for each record, since all shards at once could be more than a process may open; and without np.load,
        # whose parsing of the header takes longer than reading the record.
        info, record = self.manifest.parts[part], self._records[part]
        number, row = divmod(position, info.shard_images)
        name, rows = shard_name(part, number), min(info.shard_images, info.count - number * info.shard_images)
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(self.manifest.shards[name].bytes - (rows - row) * record.itemsize)
                values: np.void = np.frombuffer(file.read(record.itemsize), record)[0]
        except (OSError, ValueError, IndexError) as error:
            raise UnreadableMaps(f"can't read {self.folder / name}: {' '.join(str(error).split())}") from error
        return values

    def accuracy(self, positions: np.ndarray | None = None) -> float:
        """Return the teacher's top-1 accuracy in percent on validation images; ``None``: on all, else at positions."""
        shards = (self.shard("val", number) for number in range(self.manifest.parts["val"].num_shards))
        is_correct = np.concatenate([records["logits"].argmax(1) == records["label"] for records in shards])
        return 100 * float((is_correct if positions is None else is_correct[positions]).mean())

    @cached_property
    def indices(self) -> dict[str, np.ndarray]:
        """Indices of the images in the whole data set, int64 (M,), by part."""
        return {part: np.load(self.folder / indices_name(part), allow_pickle=False) for part in PARTS}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def scale_maps(maps: Tensor) -> Tensor:
    """Divide maps (N, …) by a power of two each, so that their largest absolute value lies in [0.5, 1), or is 0.

    The division is exact unless the result is subnormal.
    """
    _, exponent = torch.frexp(maps.flatten(1).abs().amax(1))
    # In two halves, each a finite power of two: a single one would overflow for the smallest maps.
    half = torch.div(exponent, 2, rounding_mode="floor")
    for part in (half, exponent - half):
        maps = torch.ldexp(maps, -part.view(-1, *[1] * (maps.dim() - 1)))
    return maps
