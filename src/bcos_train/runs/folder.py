"""Run folder: path, resume state and checkpoints."""

import json
from dataclasses import dataclass
from pathlib import Path

from bcos_train.runs import checkpoint
from bcos_train.runs.layout import BEST, CHECKPOINTS, SUMMARY

__all__ = ["RunFolder", "find_checkpoint", "find_run_folder"]


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and its state.

    Attributes:
        path: ``<runs>/<dataset>/<model>/<name>-<hash>``.
        resume_from: Newest valid checkpoint.
        finished: True if the run has ended.
        complaints: Damaged checkpoints that were skipped.
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
    """Return the folder to run in: ``base``; with ``resume=False`` the first of ``base``, ``base-2``, … that is new."""
    if not resume:
        path, n = base, 1
        while path.exists():
            n += 1
            path = base.with_name(f"{base.name}-{n}")
        return RunFolder(path)
    newest, complaints = checkpoint.newest_valid(base / CHECKPOINTS)
    return RunFolder(base, newest, (base / SUMMARY).exists(), tuple(complaints))


def find_checkpoint(folder: Path, which: str) -> Path:
    """Return the file of ``last``, ``best`` or a path.

    Raises:
        ValueError: There is none.
    """
    if which == "last":
        path, complaints = checkpoint.newest_valid(folder)
        if complaints or path is None:
            other = f"; the newest one that isn't: checkpoint={path}" if path else ""
            raise ValueError("; ".join(complaints) + other or f"no checkpoint in {folder}")
        return path
    if which == "best":
        if not (folder / BEST).exists() or not (best := json.loads((folder / BEST).read_text())):
            raise ValueError(f"no best checkpoint in {folder}: take checkpoint=last")
        path = folder / best[0]["file"]
        if not path.is_file():
            raise ValueError(f"the best checkpoint, {path.name}, is missing in {folder}: take checkpoint=last")
        return path
    if not Path(which).is_file():
        raise ValueError(f"checkpoint={which}: no such file; give best, last or a path")
    return Path(which)
