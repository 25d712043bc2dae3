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
        resume_from: Newest valid checkpoint; ``None``: start from scratch.
        finished: True if the run has ended.
        warnings: A message for each damaged checkpoint that was skipped.
    """

    path: Path
    resume_from: Path | None = None
    finished: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def name(self) -> str:
        return self.path.name


def find_run_folder(base: Path, resume: bool) -> RunFolder:
    """Return ``base``, or with ``resume=False`` the first of ``base``, ``base-2``, … that doesn't exist."""
    if not resume:
        path, n = base, 1
        while path.exists():
            n += 1
            path = base.with_name(f"{base.name}-{n}")
        return RunFolder(path)
    newest, problems = checkpoint.newest_valid(base / CHECKPOINTS)
    return RunFolder(base, newest, (base / SUMMARY).exists(), tuple(problems))


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
        if not (folder / BEST).exists() or not (best := json.loads((folder / BEST).read_text())):
            raise ValueError(f"no best checkpoint in {folder}; use checkpoint=last")
        path = folder / best[0]["file"]
        if not path.is_file():
            raise ValueError(f"the best checkpoint, {path.name}, is missing in {folder}; use checkpoint=last")
        return path
    if not Path(which).is_file():
        raise ValueError(f"checkpoint={which}: no such file; must be best, last or a path")
    return Path(which)
