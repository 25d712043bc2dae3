"""Compare WebDataset shards with their manifest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bcos_train.dataset.image import UnreadableImage, read_encoded
from bcos_train.dataset.storage.shards import FORMATS, MANIFEST
from bcos_train.dataset.storage.tar_index import BadShard, index_tar
from bcos_train.utils.files import file_sha256

__all__ = ["verify_shards"]


def verify_shards(folder: Path, on_shard: Callable[[int, int], None] | None = None) -> list[str]:
    """Read all shards of a folder again and decode every image.

    Returns:
        What differs from the manifest, and what can't be read, in one line each.

    Raises:
        ValueError: There is no manifest.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        shards = [(part, shard) for part, entry in manifest["parts"].items() for shard in entry["shards"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / MANIFEST}: no manifest of shards") from error
    problems = []
    for done, (_, shard) in enumerate(shards):
        problems += _verify(folder / shard["name"], shard)
        if on_shard is not None:
            on_shard(done + 1, len(shards))
    return problems


def _verify(path: Path, expected: dict[str, object]) -> list[str]:
    try:
        if path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
            return [f"{path}: its content is not that of the manifest"]
        samples = index_tar(path)
    except (OSError, BadShard) as error:
        return [str(error) if isinstance(error, BadShard) else f"{path}: {error.strerror}"]
    problems = [] if len(samples) == expected["samples"] else [f"{path}: {len(samples)} samples"]
    with path.open("rb") as file:
        for sample in samples:
            file.seek(sample.offset)
            try:
                read_encoded(file.read(sample.length), f"{path}:{sample.key}", FORMATS)
            except UnreadableImage as error:
                problems.append(str(error))
    return problems
