"""Run folder: path, resume state and checkpoints."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bcos_train.runs import checkpoint
from bcos_train.runs.layout import (
    BEST,
    CHECKPOINT_SUFFIX,
    CHECKPOINTS,
    EMA_WEIGHTS,
    LAST,
    SUMMARY,
    WEIGHTS,
    check_checkpoint_name,
)

__all__ = ["Resume", "RunFolder", "find_checkpoint", "is_finished", "read_run_folder"]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and its state.

    Attributes:
        path: ``<runs>/<dataset>/<model>/<name>-<hash>``.
        resume_from: Newest valid checkpoint; ``None``: start from scratch.
        finished: True if the run has ended.
        warnings: A message for each damaged or foreign checkpoint that was skipped.
        foreign: Verified checkpoints among those, which are not of this run.
    """

    path: Path
    resume_from: Path | None = None
    finished: bool = False
    warnings: tuple[str, ...] = ()
    foreign: tuple[Path, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def name(self) -> str:
        return self.path.name


#: True, False, or as True with a reservation dropped. ``"adopt"``: a checkpoint without a digest is accepted if it can be
#: read; ``"data_changed"``: the images may differ from those of the checkpoint.
Resume = bool | Literal["adopt", "data_changed"]


def is_finished(path: Path) -> bool:
    """True if the run in this folder has ended, and its results are there.

    Raises:
        ValueError: It has ended, but its results are missing or damaged, and no checkpoint is there to write them from.
    """
    if not (path / SUMMARY).exists():
        return False
    problems = _problems_of_results(path)
    if problems and not any((path / CHECKPOINTS).glob(f"*{CHECKPOINT_SUFFIX}")):
        raise ValueError(
            f"{path} is finished, but {problems[0]}, and there is no checkpoint to write it from; resume=false trains "
            "again in a new folder"
        )
    return not problems


def _problems_of_results(path: Path) -> list[str]:
    """Return what is missing or damaged in the folder of a run that has ended."""
    problems = []
    digests: object = None
    try:
        if not isinstance(summary := json.loads((path / SUMMARY).read_bytes()), dict) or not summary:
            problems.append(f"{SUMMARY} is empty")
        else:
            digests = summary.get("sha256")
    except (OSError, ValueError, RecursionError):
        problems.append(f"{SUMMARY} is damaged")
    if not isinstance(digests, dict):  # damaged, or of an older version
        digests = {}
    last = path / CHECKPOINTS / LAST
    for name in (WEIGHTS, EMA_WEIGHTS):
        weights = path / name
        is_expected = name == WEIGHTS or (last.is_file() and "model_ema" in _entries(last))
        if weights.exists():
            if not (_has_digest(weights, digests[name]) if name in digests else _is_safetensors(weights)):
                problems.append(f"{name} is damaged")
        elif is_expected:
            problems.append(f"{name} is missing")
    return problems


def _entries(path: Path) -> Collection[str]:
    try:
        return checkpoint.read_structure(path)
    except ValueError:
        return ()


def _has_digest(path: Path, digest: object) -> bool:
    try:
        return checkpoint.file_sha256(path) == digest
    except OSError:
        return False


def _is_safetensors(path: Path) -> bool:
    """True if the header can be read and the file has the length that it states; the tensors are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def read_run_folder(path: Path, *, adopt: bool = False, check: checkpoint.Check | None = None) -> RunFolder:
    """Read the state of a run, which may not have begun. The caller holds the lock, so that the state can't change.

    Args:
        path: The run folder, which need not exist.
        adopt: Accept a checkpoint without a digest if it can be read, and write its digest.
        check: Raises :class:`~bcos_train.runs.checkpoint.ForeignCheckpoint` for one that isn't of this run.

    Raises:
        ValueError: The run has checkpoints, but none of them is valid; or there is none to adopt. Other errors of
            ``check`` pass through.
    """
    finished = is_finished(path)
    if adopt and not finished:
        checkpoint.adopt(path / CHECKPOINTS)
    foreign: list[Path] = []
    newest, problems = checkpoint.newest_valid(path / CHECKPOINTS, None if finished else check, foreign)
    if newest is None and problems and not finished:
        raise ValueError(
            f"no valid checkpoint among {len(problems)} in {path / CHECKPOINTS}: {'; '.join(problems)}. Restore the "
            "files, use resume=adopt to accept one without a checksum, or resume=false to train again in a new folder"
        )
    return RunFolder(path, newest, finished, tuple(problems), tuple(foreign))


def find_checkpoint(folder: Path, which: str) -> Path:
    """Return the path of a checkpoint.

    Args:
        folder: Checkpoint folder of a run.
        which: ``"last"``, ``"best"`` or a path.

    Raises:
        ValueError: There is no such checkpoint, or the last one is damaged.
    """
    if which == "last":
        path, problems = checkpoint.newest_valid(folder)
        if problems or path is None:
            fallback = f"; the newest valid one: checkpoint={path}" if path else ""
            raise ValueError("; ".join(problems) + fallback or f"no checkpoint in {folder}")
        return path
    if which == "best":
        path = folder / _best_name(folder)
        if not path.is_file():
            raise ValueError(f"the best checkpoint, {path.name}, is missing in {folder}; use checkpoint=last")
        return path
    if not Path(which).is_file():
        raise ValueError(f"checkpoint={which}: no such file; must be best, last or a path")
    return Path(which)


def _best_name(folder: Path) -> str:
    """Return the first name in ``best.json``, which may hold anything."""
    path = folder / BEST
    try:
        best = json.loads(path.read_bytes()) if path.exists() else []
        name = best[0]["file"] if best else None
    except (OSError, ValueError, RecursionError, TypeError, LookupError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); use checkpoint=last") from error
    if not best:
        raise ValueError(f"no best checkpoint in {folder}; use checkpoint=last")
    return check_checkpoint_name(name)
