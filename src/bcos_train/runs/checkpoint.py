"""Checkpoint files that survive a crash and say when they are damaged.

The contract:

* A checkpoint is one file of tensors and JSON-able values, read with ``weights_only=True``: it can run no code.
* ``model`` holds the model's ``state_dict``, ``model_ema`` that of its moving average if there is one.
* It is written to a temporary file in the same folder, flushed to the disk and then renamed over the target; its
  SHA-256 stands beside it in ``<name>.sha256`` (``sha256sum -c`` reads it) and is checked on loading.
* A ``last.ckpt`` that it replaces becomes ``previous.ckpt``. All that takes space is on the disk before the first file
  gets another name, so at whichever moment the machine dies or the disk fills up, one of the two is whole.
"""

import contextlib
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bcos_train.runs.layout import CHECKPOINT_SUFFIX, LAST, PREVIOUS


# Exactly these: a subclass, as numpy's float64 is of float, is saved as an object, and that can't be loaded.
_SCALARS = (type(None), str, int, float, bool, torch.Tensor, torch.nn.Parameter)
_MAPPINGS = (dict, OrderedDict)


class DamagedCheckpoint(ValueError):
    """The file isn't the one that was written: its SHA-256 differs or is missing, or it can't be read."""


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write ``checkpoint`` to ``path`` as the contract says.

    Raises:
        TypeError: A value that is neither a tensor nor JSON-able.
        OSError: Disk full, or no permission; what was there is as it was.
    """
    _refuse_objects(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    for litter in path.parent.glob(f".{path.name}.*.tmp"):  # of processes that were killed while saving
        litter.unlink(missing_ok=True)
    with _staging() as stage:
        new = stage(path, lambda file: _dump(checkpoint, file))
        moves = [(_stage_digest(stage, path, file_sha256(new)), _digest_path(path)), (new, path)]
        if path.name == LAST and (digest := _valid_digest(path)) is not None:
            previous = path.with_name(PREVIOUS)
            moves = [(_stage_digest(stage, previous, digest), _digest_path(previous)), (path, previous), *moves]
        # A digest goes before its file: in between, the older file there fails the check, and the other one passes.
        for source, target in moves:
            os.replace(source, target)
        _sync_folder(path.parent)


def load(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read and verify a checkpoint.

    Raises:
        FileNotFoundError: No such file.
        DamagedCheckpoint: It fails the check.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    verify(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise DamagedCheckpoint(f"{path} can't be read: {error}") from error


def verify(path: Path) -> None:
    """Compare the file with the SHA-256 beside it.

    Raises:
        DamagedCheckpoint: They differ, there is no digest, or one of them can't be read.
    """
    digest_file = _digest_path(path)
    if not digest_file.is_file():
        raise DamagedCheckpoint(f"{path} has no {digest_file.name} beside it")
    try:
        is_same = digest_file.read_bytes().split()[:1] == [file_sha256(path).encode()]
    except OSError as error:
        raise DamagedCheckpoint(f"{path} can't be read: {error.strerror}") from error
    if not is_same:
        raise DamagedCheckpoint(f"{path} is damaged: its SHA-256 isn't the one in {digest_file.name}")


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` that passes the check, and what was wrong with those passed over."""
    complaints = []
    for path in sorted(folder.glob(f"*{CHECKPOINT_SUFFIX}"), key=_age):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def _age(path: Path) -> tuple[bool, float]:
    """Sorts the newest first. ``last.ckpt`` is that by its name: copying a folder may have changed the times."""
    try:
        return path.name != LAST, -path.stat().st_mtime_ns
    except OSError:  # a link that leads nowhere
        return True, 0.0


def delete(path: Path) -> None:
    """Remove a checkpoint and its digest; nothing if there is none."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """A second name for a checkpoint: a hard link where the file system has them, otherwise a copy."""
    digest = _digest_path(source).read_text().split()[0]

    def write(file: BinaryIO) -> None:
        with source.open("rb") as original:
            shutil.copyfileobj(original, file)

    with _staging() as stage:
        temporary = _temporary(target)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            stage(target, write)
        try:
            os.replace(_stage_digest(stage, target, digest), _digest_path(target))
            os.replace(temporary, target)
        finally:
            # Two names of one file: renaming one to the other does nothing.
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def _dump(checkpoint: Mapping[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(dict(checkpoint), file)
    except RuntimeError as error:
        # What torch says of a full disk is about positions in a stream.
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, file.name) from error
        raise


Stage = Callable[[Path, Callable[[BinaryIO], Any]], Path]


@contextlib.contextmanager
def _staging() -> Iterator[Stage]:
    """``stage(target, write)`` writes a temporary file beside the target, down to the disk; none outlives the block."""
    staged: list[Path] = []

    def stage(target: Path, write: Callable[[BinaryIO], Any]) -> Path:
        temporary = _temporary(target)
        staged.append(temporary)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        return temporary

    try:
        yield stage
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _stage_digest(stage: Stage, path: Path, digest: str) -> Path:
    line = f"{digest}  {path.name}\n".encode()
    return stage(_digest_path(path), lambda file: file.write(line))


def _valid_digest(path: Path) -> str | None:
    """The digest of a file that passes the check: one that doesn't must not take a good one's place."""
    try:
        verify(path)
    except DamagedCheckpoint:
        return None
    return _digest_path(path).read_text().split()[0]


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    # Not every file system lets a folder be opened or flushed; the rename itself has been done by then.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse_objects(value: Any, path: str = "checkpoint") -> None:
    if type(value) in _MAPPINGS:
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{path} has the key {key!r}: only str and int can be saved")
            _refuse_objects(item, f"{path}.{key}")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _refuse_objects(item, f"{path}[{i}]")
    elif type(value) not in _SCALARS:
        raise TypeError(f"{path} is a {type(value).__name__}: only tensors and JSON-able values can be saved")
