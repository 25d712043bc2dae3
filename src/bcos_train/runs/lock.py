"""Lock of a run folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from bcos_train.runs.layout import LOCK

__all__ = ["locked"]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder, so that no second process trains in it; it ends with the process in any case.

    Raises:
        ValueError: Another process holds the lock, or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
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
        yield
