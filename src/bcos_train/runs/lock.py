"""Lock of a run folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from bcos_train.runs.layout import LOCK

__all__ = ["locked"]

#: Open lock files of this process.
_HELD: set[IO[str]] = set()


def _release_in_child() -> None:
    # Loader workers outlive a killed run for some seconds; the lock must end with the run.
    for file in _HELD:
        file.close()
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, so that no second process trains in it; it ends with the process in any case.

    Raises:
        ValueError: Another process holds the lock, or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A link could lead to a file elsewhere.
        lock = open(os.open(folder / LOCK, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666), "w")
    except OSError as error:
        raise ValueError(f"can't write to {folder}: {error.strerror}") from error
    with lock as file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is training in {folder}: wait, stop it, or set another name=…") from None
        except OSError:
            pass  # the file system doesn't support locks
        _HELD.add(file)
        try:
            yield
        finally:
            _HELD.discard(file)
