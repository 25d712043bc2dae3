"""Hash and write whole files."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from bcos_train.utils.atomic import atomic_write

__all__ = ["file_sha256", "write_json"]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically; numbers that are not finite, which JSON lacks, become null.

    Args:
        path: The file.
        content: JSON-able value.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
