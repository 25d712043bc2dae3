"""Index of the samples in a tar file, to read them by random access.

A sample consists of consecutive files ``<key>.<extension>`` (WebDataset): the key is the path up to the first dot of
the file's name. Tar files are untrusted: anything that a data set doesn't need is refused, and nothing is unpacked.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

__all__ = ["BadShard", "TarSample", "index_tar"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
#: Files with a label: ``.cls`` is the index or the name of the class, ``.json`` has it as "label" and "class".
CLASS, JSON = "cls", "json"
#: Largest sizes in bytes: a file that somebody sent must not exhaust the memory.
MAX_IMAGE, MAX_CLASS, MAX_JSON = 256 * 2**20, 1024, 2**20
_END_OF_ARCHIVE = bytes(1024)


class BadShard(ValueError):
    """A tar file is cut, damaged, or has members that a shard must not have. The message is one line with its name."""


@dataclass(frozen=True)
class TarSample:
    """One sample.

    Attributes:
        key: Path up to the first dot of the files' names.
        offset, length: Position of the image in the tar file, in bytes; ``length`` 0: there is no image.
        label: Class index or class name; ``None``: there is no label.
    """

    key: str
    offset: int
    length: int
    label: int | str | None


def index_tar(path: Path) -> list[TarSample]:
    """Read the index of a tar file; of the images, nothing is read.

    Raises:
        BadShard: The file is missing, compressed, cut or damaged; a member is a link, a device or sparse, is too large
            or has an absolute name or one with ``..``; a key occurs twice, or a sample has two images.
    """
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            samples = list(_samples(tar, file, path))
            _check_end(file, tar.offset, path)
    except tarfile.TarError as error:
        raise BadShard(f"{path}: {_reason(path, error)}") from error
    except OSError as error:
        raise BadShard(f"{path}: {error.strerror or error}") from error
    if not samples:
        raise BadShard(f"{path}: no images ({', '.join(IMAGE_EXTENSIONS)})")
    return samples


def _samples(tar: tarfile.TarFile, file: BinaryIO, path: Path) -> Iterator[TarSample]:
    seen: set[str] = set()
    files: dict[str, tarfile.TarInfo] = {}
    key = None
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all of them, a gigabyte for a million files
        if not _is_data(member, path):
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        extension = extension.lower()
        if extension in IMAGE_EXTENSIONS:
            extension, limit = "image", MAX_IMAGE
        elif extension in (CLASS, JSON):
            limit = MAX_CLASS if extension == CLASS else MAX_JSON
        else:
            continue
        if member.size > limit:
            raise BadShard(f"{path}: {member.name!r} has {member.size:,} bytes, at most {limit:,} are allowed")
        member_key = f"{folder}/{stem}" if folder else stem
        if member_key != key:
            if key is not None:
                yield _sample(key, files, file, path)
            if member_key in seen:
                raise BadShard(f"{path}: the files of the sample {member_key!r} are not consecutive")
            key, files = member_key, {}
            seen.add(key)
        if extension in files:
            raise BadShard(f"{path}: the sample {key!r} has two files {files[extension].name!r} and {member.name!r}")
        files[extension] = member
    if key is not None:
        yield _sample(key, files, file, path)


def _is_data(member: tarfile.TarInfo, path: Path) -> bool:
    """Return whether a member is a file of a sample; False for folders and hidden files.

    Raises:
        BadShard: It is something that a shard must not have.
    """
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\\" in member.name or not member.name.isprintable():
        raise BadShard(f"{path}: {member.name!r} is not a relative path inside the shard")
    if member.isdir():
        return False
    if not member.isreg() or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "sparse" if member.issparse() else "a special file"
        raise BadShard(f"{path}: {member.name!r} is {kind}, a shard contains plain files only")
    return not any(part.startswith(".") for part in parts if part != ".")


def _sample(key: str, files: dict[str, tarfile.TarInfo], file: BinaryIO, path: Path) -> TarSample:
    image = files.get("image")
    offset, length = (0, 0) if image is None else (image.offset_data, image.size)
    label: int | str | None = None
    if (member := files.get(CLASS)) is not None:
        label = _class_of(_read(file, member, path))
    elif (member := files.get(JSON)) is not None:
        label = _json_label(_read(file, member, path))
    return TarSample(key, offset, length, label)


def _read(file: BinaryIO, member: tarfile.TarInfo, path: Path) -> bytes:
    position = file.tell()
    file.seek(member.offset_data)
    content = file.read(member.size)
    file.seek(position)
    if len(content) < member.size:
        raise BadShard(f"{path}: cut in {member.name!r}")
    return content


def _class_of(content: bytes) -> int | str | None:
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        return None
    return int(text) if text.isascii() and text.isdigit() else text or None


def _json_label(content: bytes) -> int | str | None:
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entries, dict):
        return None
    for key in ("label", "class"):
        value = entries.get(key)
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            return value
    return None


def _check_end(file: BinaryIO, offset: int, path: Path) -> None:
    """Raise :class:`BadShard` unless the end-of-archive marker is at ``offset``: without it, the file has been cut."""
    file.seek(offset)
    size = os.fstat(file.fileno()).st_size
    if size < offset or file.read(len(_END_OF_ARCHIVE)) != _END_OF_ARCHIVE:
        raise BadShard(f"{path}: cut after {size:,} bytes: the end of the archive is missing")


def _reason(path: Path, error: tarfile.TarError) -> str:
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "compressed: unpack it to .tar, in which single images can be read"
    return f"not a tar file, cut or damaged ({error})"
