"""Checkpoint files that survive crashes, with damage detection.

The contract:

* A checkpoint is one file of tensors and JSON-able values, read with ``weights_only=True``: reading it runs no code.
* ``model`` holds the model's ``state_dict``, and ``model_ema`` that of its moving average if there is one.
* It is written to a temporary file in the same folder, flushed to disk and then renamed over the target. Its SHA-256 is
  stored beside it in ``<name>.sha256`` (readable by ``sha256sum -c``) and verified on loading.
* A ``last.ckpt`` that is replaced becomes ``previous.ckpt``; one that fails the verification is renamed to
  ``last.ckpt.unverified-1``, for it may be good after all. All files are fully on disk before the first one is
  renamed, so one of the two is valid whenever the machine crashes or the disk is full.
"""

import contextlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from bcos_train.runs.layout import CHECKPOINT_SUFFIX, DIGEST_SUFFIX, LAST, PREVIOUS
from bcos_train.utils.atomic import temporary_path
from bcos_train.utils.files import file_sha256
from bcos_train.utils.substitutes import substitute_reason

# Exact types: a subclass, such as numpy's float64 of float, is pickled as an object, which can't be loaded.
_SCALARS = (type(None), str, int, float, bool, torch.Tensor, torch.nn.Parameter)
_MAPPINGS = (dict, OrderedDict)


class DamagedCheckpoint(ValueError):
    """The checkpoint's SHA-256 differs or is missing, or the file can't be read."""


class ForeignCheckpoint(ValueError):
    """The checkpoint is intact, but training can't resume from it: it is of another run, or incomplete."""


#: Content of a checkpoint: tensors, and what JSON can hold.
Checkpoint = dict[str, Any]
#: Raises :class:`ForeignCheckpoint` for the content of a checkpoint, see :func:`read_structure`.
Check = Callable[[Checkpoint], object]


def save(checkpoint: Mapping[str, object], path: Path) -> None:
    """Write a checkpoint as described by the contract.

    Raises:
        TypeError: A value is neither a tensor nor JSON-able.
        OSError: The disk is full, or permission is denied; existing files are unchanged.
    """
    _check_serializable(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # from processes that were killed while saving
        leftover.unlink(missing_ok=True)
    with _staging() as stage:
        new = stage(path, lambda file: _dump(checkpoint, file))
        moves = [(_stage_digest(stage, path, file_sha256(new)), digest_path(path)), (new, path)]
        if path.name == LAST and (digest := _valid_digest(path)) is not None:
            previous = path.with_name(PREVIOUS)
            moves = [(_stage_digest(stage, previous, digest), digest_path(previous)), (path, previous), *moves]
        elif path.is_file():
            set_aside(path)
        # Digests are renamed before their files: in between, only the older file at that path fails verification.
        for source, target in moves:
            os.replace(source, target)
        _sync_folder(path.parent)


def load(path: Path, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Verify and load a checkpoint.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedCheckpoint: The verification fails.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    verify(path)
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} can't be read: {error.strerror}") from error
    except Exception as error:
        # The message of torch advises to load the file without protection.
        raise DamagedCheckpoint(f"{path} can't be read ({type(error).__name__})") from error


def verify(path: Path) -> None:
    """Compare a checkpoint with the SHA-256 beside it.

    Raises:
        DamagedCheckpoint: They differ, there is no digest, or one of the files can't be read.
    """
    digest_file = digest_path(path)
    if not has_digest(path):
        is_empty = digest_file.is_file()
        raise DamagedCheckpoint(f"{path} has {'an empty' if is_empty else 'no'} {digest_file.name} beside it")
    try:
        is_same = _read_digest(path) == file_sha256(path)
        reason = None if is_same else substitute_reason(path)
    except OSError as error:
        raise DamagedCheckpoint(f"{path} can't be read: {error.strerror}") from error
    if reason is not None:
        raise DamagedCheckpoint(f"{path} {reason}")
    if not is_same:
        raise DamagedCheckpoint(f"{path} is damaged: its SHA-256 isn't the one in {digest_file.name}")


def has_digest(path: Path) -> bool:
    """True if there is a digest beside a checkpoint; an interrupted copy can leave an empty file."""
    digest_file = digest_path(path)
    return digest_file.exists() and (not digest_file.is_file() or digest_file.stat().st_size > 0)


def read_structure(path: Path) -> Checkpoint:
    """Read a checkpoint with tensors that have shapes but no values, within milliseconds.

    Raises:
        ForeignCheckpoint: It can't be read.
    """
    try:
        content = torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        # The message of torch advises to load the file without protection.
        raise ForeignCheckpoint(f"not a file that this package saved ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise ForeignCheckpoint(f"it holds a {type(content).__name__}")
    return content


def newest_valid(
    folder: Path, check: Check | None = None, foreign: list[Path] | None = None
) -> tuple[Path | None, list[str]]:
    """Return the newest valid checkpoint in ``folder``, and a message for each one that was skipped.

    Args:
        check: Raises :class:`ForeignCheckpoint` for a verified checkpoint to be skipped.
        foreign: Receives the paths of those.
    """
    problems = []
    for path in _newest_first(folder):
        try:
            verify(path)
            if check is not None:
                check(read_structure(path))
        except DamagedCheckpoint as error:
            problems.append(str(error))
        except ForeignCheckpoint as error:
            problems.append(f"{path} is not a checkpoint of this run: {error}")
            if foreign is not None:
                foreign.append(path)
        else:
            return path, problems
    return None, problems


def _newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``; ``last.ckpt`` is first, since copying a folder may change the times."""

    def key(path: Path) -> tuple[bool, float]:
        try:
            return path.name != LAST, -path.stat().st_mtime_ns
        except OSError:  # a broken link
            return True, 0.0

    return sorted(folder.glob(f"*{CHECKPOINT_SUFFIX}"), key=key)


def adopt(folder: Path) -> Path:
    """Write the digest of the newest checkpoint without one, if no checkpoint in ``folder`` is valid.

    Raises:
        ValueError: There is no checkpoint without a digest, or it can't be read.
    """
    newest, problems = newest_valid(folder)
    if newest is not None:
        return newest
    unsigned = (path for path in _newest_first(folder) if path.is_file() and not has_digest(path))
    path = next(unsigned, None)
    if path is None:
        raise ValueError(f"no checkpoint to adopt in {folder}: {'; '.join(problems) or 'it has none'}")
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"can't adopt {path}: it can't be read ({type(error).__name__})") from error
    with _staging() as stage:
        os.replace(_stage_digest(stage, path, file_sha256(path)), digest_path(path))
    return path


def delete(path: Path) -> None:
    """Remove a checkpoint and its digest, if they exist."""
    path.unlink(missing_ok=True)
    digest_path(path).unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a checkpoint, as a hard link if the file system supports it."""
    digest = _read_digest(source)

    def write(file: BinaryIO) -> None:
        with source.open("rb") as original:
            shutil.copyfileobj(original, file)

    with _staging() as stage:
        temporary = temporary_path(target)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            stage(target, write)
        try:
            os.replace(_stage_digest(stage, target, digest), digest_path(target))
            os.replace(temporary, target)
        finally:
            # Renaming does nothing if both names are links to the same file.
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)


def _dump(checkpoint: Mapping[str, object], file: BinaryIO) -> None:
    try:
        torch.save(dict(checkpoint), file)
    except RuntimeError as error:
        # For a full disk, torch's own message is about stream positions.
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, file.name) from error
        raise


#: ``stage(target, write)`` writes a temporary file beside the target and flushes it to disk.
Stage = Callable[[Path, Callable[[BinaryIO], object]], Path]


@contextlib.contextmanager
def _staging() -> Iterator[Stage]:
    """Stage files, and remove those that were not renamed by the end of the block."""
    staged: list[Path] = []

    def stage(target: Path, write: Callable[[BinaryIO], object]) -> Path:
        temporary = temporary_path(target)
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


def _stage_digest(stage: Stage, path: Path, digest: str) -> Path:
    line = f"{digest}  {path.name}\n".encode()
    return stage(digest_path(path), lambda file: file.write(line))


def set_aside(path: Path) -> None:
    """Rename a checkpoint and its digest, so that they are not overwritten."""
    n = 1
    while (target := path.with_name(f"{path.name}.unverified-{n}")).exists():
        n += 1
    if digest_path(path).exists():
        os.replace(digest_path(path), digest_path(target))
    os.replace(path, target)


def _valid_digest(path: Path) -> str | None:
    """Return the digest of a valid checkpoint, or None; a damaged file must not replace a valid one."""
    try:
        verify(path)
    except DamagedCheckpoint:
        return None
    return _read_digest(path)


def _read_digest(path: Path) -> str:
    """Return the digest stored beside a checkpoint; bytes that are no text, as in a damaged file, are replaced."""
    return (digest_path(path).read_text(errors="replace").split() or [""])[0]


def digest_path(path: Path) -> Path:
    """Return the path of a checkpoint's SHA-256."""
    return path.with_name(path.name + DIGEST_SUFFIX)


def _sync_folder(folder: Path) -> None:
    # Some file systems can't open or flush folders; the rename has already happened.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_serializable(value: object, path: str = "checkpoint") -> None:
    if isinstance(value, dict) and type(value) in _MAPPINGS:
        for key, item in value.items():
            if type(key) not in (str, int):
                raise TypeError(f"{path} has the key {key!r}: only str and int can be saved")
            _check_serializable(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_serializable(item, f"{path}[{i}]")
    elif type(value) not in _SCALARS:
        raise TypeError(f"{path} is a {type(value).__name__}: only tensors and JSON-able values can be saved")
