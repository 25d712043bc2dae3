"""Checkpoint files that survive a crash and say when they are damaged.

The contract:

* A checkpoint is one file of tensors and JSON-able values, read with ``weights_only=True``: it can run no code.
* ``model`` holds the model's ``state_dict``, ``model_ema`` that of its moving average if there is one.
* It is written to a temporary file in the same folder, flushed to the disk and then renamed over the target; its
  SHA-256 stands beside it in ``<name>.sha256`` (``sha256sum -c`` reads it) and is checked on loading.
* The file that it replaces becomes ``previous.ckpt``. At whichever moment the machine dies, one of the two is whole.
"""

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
SUFFIX = ".ckpt"


class DamagedCheckpoint(ValueError):
    """The file isn't the one that was written: its SHA-256 differs or is missing, or it can't be read."""


def save(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write ``checkpoint`` to ``path`` as the contract says.

    Raises:
        TypeError: A value that is neither a tensor nor JSON-able.
        OSError: Disk full, or no permission; the file at ``path`` is as it was.
    """
    _refuse_objects(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(temporary)
        if path.name == LAST and path.exists():
            _keep_previous(path)
        # The digest comes first: between the two steps the older file fails the check, and `previous` passes it.
        _write_digest(path, digest)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
        DamagedCheckpoint: They differ, or there is no digest.
    """
    digest_file = _digest_path(path)
    if not digest_file.is_file():
        raise DamagedCheckpoint(f"{path} has no {digest_file.name} beside it")
    if digest_file.read_text().split()[:1] != [_sha256(path)]:
        raise DamagedCheckpoint(f"{path} is damaged: its SHA-256 isn't the one in {digest_file.name}")


def newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` that passes the check, and what was wrong with those passed over."""
    complaints = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns, reverse=True):
        try:
            verify(path)
        except DamagedCheckpoint as error:
            complaints.append(str(error))
        else:
            return path, complaints
    return None, complaints


def delete(path: Path) -> None:
    """Remove a checkpoint and its digest; nothing if there is none."""
    path.unlink(missing_ok=True)
    _digest_path(path).unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """A second name for a checkpoint: a hard link where the file system has them, otherwise a copy."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with temporary.open("wb") as file:
            file.write(source.read_bytes())
            file.flush()
            os.fsync(file.fileno())
    _write_digest(target, _digest_path(source).read_text().split()[0])
    os.replace(temporary, target)
    _sync_folder(target.parent)


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's door to :func:`save` and :func:`load`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: Any = None) -> dict[str, Any]:
        return load(Path(path), map_location="cpu" if map_location is None else map_location)

    def remove_checkpoint(self, path: Any) -> None:
        delete(Path(path))


def _keep_previous(path: Path) -> None:
    digest_file = _digest_path(path)
    if digest_file.exists():
        previous = path.with_name(PREVIOUS)
        _write_digest(previous, digest_file.read_text().split()[0])
        os.replace(path, previous)


def _write_digest(path: Path, digest: str) -> None:
    target = _digest_path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(f"{digest}  {path.name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _digest_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _sha256(path: Path) -> str:
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
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise TypeError(f"{path} has the key {key!r}: only str and int can be saved")
            _refuse_objects(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_objects(item, f"{path}[{i}]")
    elif not (value is None or isinstance(value, str | int | float | bool | torch.Tensor)):
        raise TypeError(f"{path} is a {type(value).__name__}: only tensors and JSON-able values can be saved")
