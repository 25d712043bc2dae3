"""The lock of a run folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from bcos_train.runs.layout import LOCK

__all__ = ["locked"]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from training in the same folder; the lock ends with the process, however it ends.

    Raises:
        ValueError: Another process holds it, or the folder can't be written to.
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
            raise ValueError(f"another process is training in {folder}: wait, stop it, or give name=…") from None
        except OSError:
            pass  # a file system without locks
        yield
