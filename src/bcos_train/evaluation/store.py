"""Store results on disk: scores, so that an interrupted measurement resumes, and JSON files."""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bcos_train.utils.atomic import atomic_write

__all__ = ["ScoreStore", "fingerprint", "replace_file"]

_SCORES, _IDENTITY = "scores", "identity"


class ScoreStore:
    """Scores in one file per metric and method, rewritten after every batch.

    Each file records what its scores depend on. With another identity it counts as missing and is overwritten.

    Args:
        folder: Created when the first file is written; ``None``: store nothing.
        identity: Everything that all scores depend on.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, object]) -> None:
        self.folder, self.identity = folder, identity

    def load(self, metric: str, method: str, settings: Mapping[str, object]) -> Tensor | None:
        """Load the scores so far, (units, ...), or None."""
        if self.folder is None:
            return None
        try:
            with self._path(metric, method).open("rb") as file, np.load(file, allow_pickle=False) as content:
                if str(content[_IDENTITY]) == self._fingerprint(settings):
                    return torch.from_numpy(content[_SCORES].copy())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # missing or damaged
            pass
        return None

    def save(self, metric: str, method: str, settings: Mapping[str, object], scores: Tensor) -> None:
        """Store all scores so far, (units, ...)."""
        if self.folder is None:
            return
        path = self._path(metric, method)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, {_SCORES: scores.numpy(), _IDENTITY: np.array(self._fingerprint(settings))})

    def _path(self, metric: str, method: str) -> Path:
        assert self.folder is not None
        return self.folder / metric / f"{method}.npz"

    def _fingerprint(self, settings: Mapping[str, object]) -> str:
        return fingerprint({"all": self.identity, "own": settings})


def replace_file(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an npz file atomically."""
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **dict(arrays))  # type: ignore[arg-type]


def fingerprint(content: object) -> str:
    """Return the SHA-256 of JSON-able values, tensors, and the weights and buffers of modules, in hexadecimal."""
    digest = hashlib.sha256()
    for part in _byte_parts(content):
        digest.update(part)
    return digest.hexdigest()


def _byte_parts(value: object) -> Iterator[bytes]:
    if isinstance(value, nn.Module):
        yield from _byte_parts(value.state_dict())
    elif isinstance(value, Mapping):
        for key in sorted(value):
            yield from _byte_parts(str(key))
            yield from _byte_parts(value[key])
    elif isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        yield json.dumps(value, sort_keys=True, default=str).encode()
