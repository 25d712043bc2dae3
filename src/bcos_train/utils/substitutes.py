"""Recognize files that stand in for the data they should hold."""

import os

__all__ = ["substitute_reason"]

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_HTML = (b"<!doctype html", b"<html")


def substitute_reason(source: str | os.PathLike[str] | bytes) -> str | None:
    """Return why a binary file doesn't hold its data: a Git LFS pointer, a web page or empty; ``None``: it may.

    Args:
        source: Path, or content.

    Raises:
        OSError: The file can't be read.
    """
    if isinstance(source, bytes):
        start = source[:64]
    else:
        with open(source, "rb") as file:
            start = file.read(64)
    if not start:
        return "is empty"
    if start.startswith(_LFS_POINTER):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    if start.lstrip().lower().startswith(_HTML):
        return "is a web page (HTML), not the file itself: download it again"
    return None
