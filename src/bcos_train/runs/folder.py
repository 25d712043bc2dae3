"""Where a run lives, and whether it was there before."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcos_train.runs import checkpoint as files

CONFIG = "config.yaml"
SUMMARY = "summary.json"
CHECKPOINTS = "checkpoints"

#: Config keys that change where, how fast or how visibly a run goes, but not what comes out of it.
WITHOUT_EFFECT = (
    "name",
    "runs",
    "resume",
    "plugins",
    "logger",
    "checkpointing",
    "explanation",
    "num_workers",
    "dataset.download",
    "dataset.cache",
    "model.backend",
    "model.grad_checkpointing",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.max_batch_per_device",
    "trainer.channels_last",
    "trainer.compile",
    "trainer.log_every_n_steps",
    "trainer.progress",
)


#: Data sets that are the same wherever they lie; of any other, the folder says what is in it.
SAME_ANYWHERE = ("bcos_train.dataset.Cifar10", "bcos_train.dataset.ImageNet")


def run_hash(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that depend on what changes results, and on nothing else.

    Without synchronised statistics batch norms depend on how many images a device sees, that is on the hardware; the
    hash names what was asked for.
    """
    kept = _numbers_alike(_without(config, WITHOUT_EFFECT))
    dataset = kept.get("dataset", {})
    root = dataset.pop("root", None)
    if root is not None and dataset["_target_"] not in SAME_ANYWHERE:
        dataset["root"] = os.path.abspath(os.path.expanduser(root))
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def _numbers_alike(value: Any) -> Any:
    """``1`` and ``1.0`` are one setting."""
    if isinstance(value, Mapping):
        return {key: _numbers_alike(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers_alike(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _without(config: Mapping[str, Any], paths: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path not in paths:
            kept[key] = _without(value, paths, f"{path}.") if isinstance(value, Mapping) else value
    return kept


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and what was found in it.

    Attributes:
        path: ``<runs>/<dataset>/<model>/<name>-<hash>``.
        resume_from: Newest valid checkpoint.
        finished: The run has ended.
        complaints: Damaged checkpoints that were passed over.
    """

    path: Path
    resume_from: Path | None = None
    finished: bool = False
    complaints: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def name(self) -> str:
        return self.path.name


def find_run_folder(base: Path, resume: bool) -> RunFolder:
    """The folder to run in: ``base``, or with ``resume=False`` the first of ``base``, ``base-2``, … not yet there."""
    if not resume:
        path, n = base, 1
        while path.exists():
            n += 1
            path = base.with_name(f"{base.name}-{n}")
        return RunFolder(path)
    newest, complaints = files.newest_valid(base / CHECKPOINTS)
    return RunFolder(base, newest, (base / SUMMARY).exists(), tuple(complaints))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process from training in the same folder; the lock goes with the process, however it ends.

    Raises:
        ValueError: Another process holds it, or the folder can't be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
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
