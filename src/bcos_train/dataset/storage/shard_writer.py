"""Write a data set as WebDataset shards."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from io import BytesIO
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from bcos_train.dataset.base import Annotations, ImageDataset, ImageSource, Label
from bcos_train.dataset.image import UnreadableImage, has_format
from bcos_train.dataset.inventory import take_inventory
from bcos_train.dataset.randomness import Stream, permutation
from bcos_train.dataset.storage.shards import FORMATS, MANIFEST
from bcos_train.dataset.subset import labels_of, path_of
from bcos_train.utils.atomic import atomic_write, remove_leftovers
from bcos_train.utils.files import file_sha256, write_json

__all__ = ["SKIPPED", "OtherShards", "ShardOptions", "write_shards"]

SKIPPED = "skipped.json"
#: Records of finished shards until the manifest is written.
_RECORDS, _PLAN = ".finished", "plan.json"
_PARTS: tuple[Literal["train", "val"], ...] = ("train", "val")
#: Files that are copied as they are.
_COPIED = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
#: Samples in a shard if the size of the images is unknown.
_SAMPLES = 10_000


class OtherShards(ValueError):
    """The folder has shards of another data set or of other options."""


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How shards are written.

    Args:
        samples: Samples in each shard; ``None``: as many as have about ``megabytes``.
        megabytes: Size of a shard.
        max_side: Encode images anew as JPEG whose short side is longer than this, in pixels; ``None``: copy all files.
        quality: Of these, from 1 to 95.
        order: ``"dataset"``, or ``"balanced"``: in each stretch, classes are as frequent as in the whole data set; for
            reading in streams.
        seed: Of the balanced order.

    Raises:
        ValueError: A value is out of range.
    """

    samples: int | None = None
    megabytes: int = 1000
    max_side: int | None = None
    quality: int = 90
    order: Literal["dataset", "balanced"] = "dataset"
    seed: int = 0

    def __post_init__(self) -> None:
        for key, value, least in (
            ("samples", self.samples, 1),
            ("megabytes", self.megabytes, 1),
            ("max_side", self.max_side, 1),
            ("quality", self.quality, 1),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"{key}={value}: at least {least}")
        if self.quality > 95:
            raise ValueError(f"quality={self.quality}: at most 95, above which files grow and images don't improve")
        if self.order not in ("dataset", "balanced"):
            raise ValueError(f"order={self.order}: dataset or balanced")


@dataclass(frozen=True)
class _Job:
    """One shard: the images ``indices`` of a part, in this order."""

    name: str
    part: str
    indices: np.ndarray


def write_shards(
    source: ImageSource,
    folder: Path,
    options: ShardOptions,
    processes: int = 1,
    on_shard: Callable[[int, int], None] | None = None,
) -> dict[str, object]:
    """Write both parts of a data set, as ``train-000000.tar``, … and ``val-000000.tar``, …, with a manifest.

    A sample consists of the image (``jpg``, ``png`` or ``webp``), the class index (``cls``; for data sets with several
    labels per image ``json`` has them), and ``json``: class name, path of the source, boxes and group where there are
    any. Two runs write identical bytes. Finished shards are kept if the process is interrupted.

    Args:
        source: The data set.
        folder: Receives the shards.
        processes: Number of shards that are written at the same time.
        on_shard: Called with the number of finished shards and of all shards.

    Returns:
        The manifest.

    Raises:
        OtherShards: ``folder`` has shards of other images or options.
    """
    parts: dict[str, ImageDataset] = {"train": source.train(), "val": source.val()}
    plan = {
        "version": 1,
        "dataset": source.name,
        "class_names": list(source.class_names),
        "images": take_inventory(parts["train"], parts["val"]),
        "options": asdict(options),
    }
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    _check_plan(folder, plan)
    (folder / _RECORDS).mkdir(exist_ok=True)
    write_json(folder / _RECORDS / _PLAN, plan)
    jobs = [job for part in _PARTS for job in _plan_part(part, parts[part], options)]
    records = _finished(folder, jobs)
    if on_shard is not None:
        on_shard(len(records), len(jobs))
    todo = [job for job in jobs if job.name not in records]
    root = getattr(source, "root", None)
    names = list(source.class_names)
    for job, record in _write_all(parts, names, root and str(root), folder, options, todo, processes):
        records[job.name] = record
        if on_shard is not None:
            on_shard(len(records), len(jobs))
    manifest = {**plan, "parts": {part: _summary(part, jobs, records) for part in _PARTS}}
    skipped = [entry for job in jobs for entry in records[job.name]["skipped"]]
    write_json(folder / SKIPPED, skipped)
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / _RECORDS, ignore_errors=True)
    return manifest


def _plan_part(part: str, images: ImageDataset, options: ShardOptions) -> list[_Job]:
    """Divide the images of a part into shards."""
    order = _order(images, options, part)
    if options.samples is not None:
        ends = np.arange(options.samples, len(order), options.samples)
    elif (sizes := _sizes(images)) is None:
        ends = np.arange(_SAMPLES, len(order), _SAMPLES)
    else:
        limit = options.megabytes * 10**6
        shard = (np.cumsum(sizes[order]) - 1) // limit
        ends = np.flatnonzero(np.diff(shard)) + 1
    return [_Job(f"{part}-{n:06d}.tar", part, indices) for n, indices in enumerate(np.split(order, ends))]


def _order(images: ImageDataset, options: ShardOptions, part: str) -> np.ndarray:
    n = len(images)  # type: ignore[arg-type]  # map-style data sets have a length
    if options.order == "dataset":
        return np.arange(n)
    shuffled = permutation(n, options.seed, Stream.SHARDS, int(part == "val"))
    labels = labels_of(images)[shuffled]
    if labels.ndim > 1:  # several labels per image
        return shuffled
    # The j-th of the n images of a class is at about j/n of the whole.
    position = np.empty(n)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        position[own] = (np.arange(len(own)) + 0.5) / len(own)
    return shuffled[np.argsort(position, kind="stable")]


def _sizes(images: ImageDataset) -> np.ndarray | None:
    """Return the size of each image file in bytes; None if the images are not files."""
    paths = [_path(images, index) for index in range(len(images))]  # type: ignore[arg-type]
    if any(path is None for path in paths):
        return None
    return np.array([os.path.getsize(path) for path in paths if path is not None])


def _path(images: ImageDataset, index: int) -> str | None:
    """Return the file of an image; None if it isn't one."""
    path = path_of(images, index)
    return path if path is not None and os.path.exists(path) else None


def _write_all(
    parts: dict[str, ImageDataset],
    class_names: list[str],
    root: str | None,
    folder: Path,
    options: ShardOptions,
    jobs: Sequence[_Job],
    processes: int,
) -> Iterator[tuple[_Job, dict[str, object]]]:
    arguments = (parts, class_names, root, folder, options)
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, _write_shard(job, *arguments)
        return
    # Forked processes share the data set, which may be an index of a million images.
    context = get_context("fork" if "fork" in get_all_start_methods() else None)
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _start_worker, arguments) as pool:
        futures = {pool.submit(_write_in_worker, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker_arguments: tuple[Any, ...] = ()


def _start_worker(*arguments: object) -> None:
    global _worker_arguments
    _worker_arguments = arguments


def _write_in_worker(job: _Job) -> dict[str, object]:
    return _write_shard(job, *_worker_arguments)


def _write_shard(
    job: _Job,
    parts: dict[str, ImageDataset],
    class_names: list[str],
    root: str | None,
    folder: Path,
    options: ShardOptions,
) -> dict[str, object]:
    """Write one shard, and then its record."""
    images, skipped, count = parts[job.part], [], 0
    path = folder / job.name
    with atomic_write(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in job.indices.tolist():
            source = _path(images, index)
            name = None if source is None else os.path.relpath(source, root) if root else os.path.basename(source)
            try:
                image, label, *rest = images[index]
                content, extension, scale = _encode(image, source, options)
            except UnreadableImage as error:
                skipped.append({"shard": job.name, "index": index, "source": name, "reason": str(error)})
                continue
            entries = _entries(label, rest[0] if rest else Annotations(), class_names, scale)
            if name is not None:
                entries["source"] = name
            _add(tar, f"{index:08d}.{extension}", content)
            if not isinstance(label, np.ndarray):
                _add(tar, f"{index:08d}.cls", str(label).encode())
            _add(tar, f"{index:08d}.json", json.dumps(entries, ensure_ascii=False, sort_keys=True).encode())
            count += 1
    record = {"samples": count, "bytes": path.stat().st_size, "sha256": file_sha256(path), "skipped": skipped}
    write_json(folder / _RECORDS / f"{job.name}.json", record)
    return record


def _encode(image: Image.Image, source: str | None, options: ShardOptions) -> tuple[bytes, str, float]:
    """Return the content, the extension and the scale of an image."""
    if options.max_side is not None and (side := min(image.size)) > options.max_side:
        scale = options.max_side / side
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        buffer = BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=options.quality)
        return buffer.getvalue(), "jpg", scale
    extension = None if source is None else _COPIED.get(os.path.splitext(source)[1].lower())
    if source is not None and extension is not None and has_format(source, FORMATS):
        return Path(source).read_bytes(), extension, 1.0
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png", 1.0


def _entries(label: Label, annotations: Annotations, class_names: list[str], scale: float) -> dict[str, object]:
    entries: dict[str, object] = {}
    if isinstance(label, np.ndarray):
        entries["labels"] = np.flatnonzero(label).tolist()
    else:
        entries["class"] = class_names[label]
    if annotations.boxes is not None:
        boxes = annotations.boxes.astype(np.float64)
        boxes[:, 1:3] = np.floor(boxes[:, 1:3] * scale)
        boxes[:, 3:5] = np.ceil(boxes[:, 3:5] * scale)
        entries["boxes"] = boxes.astype(np.int64).tolist()
    if annotations.group is not None:
        entries["group"] = annotations.group
    return entries


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # without time and owner: two runs write the same bytes
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def _check_plan(folder: Path, plan: dict[str, object]) -> None:
    """Raise :class:`OtherShards` if the folder is for something else."""
    for file in (folder / _RECORDS / _PLAN, folder / MANIFEST):
        if not file.is_file():
            continue
        recorded = json.loads(file.read_text(encoding="utf-8"))
        for key, value in plan.items():
            if recorded.get(key) != json.loads(json.dumps(value)):
                raise OtherShards(f"out={folder} has shards of other {key}: choose another folder, or delete it")
        return
    if strange := sorted(path.name for path in folder.glob("*.tar")):
        raise OtherShards(f"out={folder} has tar files without a manifest, such as {strange[0]}: choose another folder")


def _finished(folder: Path, jobs: Sequence[_Job]) -> dict[str, dict[str, Any]]:
    """Return the records of the shards that are there."""
    records: dict[str, dict[str, Any]] = {}
    if (folder / MANIFEST).is_file():
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        skipped = json.loads((folder / SKIPPED).read_text(encoding="utf-8"))
        for entry in manifest["parts"].values():
            for shard in entry["shards"]:
                own = [image for image in skipped if image["shard"] == shard["name"]]
                records[shard["name"]] = {key: shard[key] for key in ("samples", "bytes", "sha256")} | {"skipped": own}
    for job in jobs:
        path = folder / _RECORDS / f"{job.name}.json"
        if path.is_file():
            records[job.name] = json.loads(path.read_text(encoding="utf-8"))
    is_there = {
        name: (folder / name).is_file() and (folder / name).stat().st_size == records[name]["bytes"] for name in records
    }
    return {name: record for name, record in records.items() if is_there[name]}


def _summary(part: str, jobs: Sequence[_Job], records: dict[str, dict[str, Any]]) -> dict[str, object]:
    own = [job.name for job in jobs if job.part == part]
    return {
        "samples": sum(records[name]["samples"] for name in own),
        "skipped": sum(len(records[name]["skipped"]) for name in own),
        "shards": [
            {"name": name, **{key: records[name][key] for key in ("samples", "bytes", "sha256")}} for name in own
        ],
    }
