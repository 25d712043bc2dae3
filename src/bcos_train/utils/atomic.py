"""Write files atomically."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write", "remove_leftovers", "temporary_path", "unused_path"]


def temporary_path(path: Path) -> Path:
    """Return the path beside ``path`` where this process prepares the file or folder that replaces it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def unused_path(path: Path) -> Path:
    """Return the first of ``path``, ``path-2``, ``path-3``, … that doesn't exist."""
    unused, n = path, 1
    while os.path.lexists(unused):
        n += 1
        unused = path.with_name(f"{path.name}-{n}")
    return unused


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files under ``folder`` of processes that were killed while writing."""
    for path in folder.rglob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if path.is_file() and pid.isdigit() and not _is_running(int(pid)):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; at the end of the block the file there replaces ``path``.

    The content is on disk before it replaces ``path``. After an exception or a crash, ``path`` is unchanged.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
