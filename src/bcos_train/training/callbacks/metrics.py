"""Logging at the moment of the call.

Lightning hands what ``self.log`` was given to the loggers after the hooks of a batch or an epoch have run, that is
after a checkpoint was written there: a run stopped in between would lose those rows for good.
"""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from bcos_train.runs.layout import METRICS, read_metrics
from bcos_train.utils.atomic import atomic_write


def log_now(module: pl.LightningModule, metrics: Mapping[str, float]) -> None:
    """Write ``metrics`` to all loggers under the number of optimizer steps taken, and show them to callbacks."""
    if isinstance(epoch_metrics := getattr(module, "epoch_metrics", None), dict):
        epoch_metrics.update(metrics)
    module.log_dict(dict(metrics), logger=False, rank_zero_only=True)
    row = {**metrics, "epoch": module.current_epoch}
    for logger in module.trainer.loggers:
        logger.log_metrics(row, step=module.global_step)


class CsvLogger(Logger):
    """``metrics.csv`` in the run folder: a row for each step at which something was logged.

    Rows are appended as they come; the file is written anew only when a metric appears for the first time, or belongs
    to the row before. What has been logged is on the disk, so a checkpoint never knows of steps that the file doesn't.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / METRICS
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        if self.path.exists():
            self._drop_half_a_line()
            self._rows = read_metrics(self.path)
            self._columns = list(dict.fromkeys(key for row in self._rows for key in row))

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds the whole config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, **{key: _plain(value) for key, value in metrics.items()}}
        new = [key for key in row if key not in self._columns]
        self._columns += new
        if self._rows and self._rows[-1]["step"] == step and self._rows[-1].get("epoch") == row.get("epoch"):
            self._rows[-1].update(row)
            self._rewrite()
        elif new or not self.path.exists():
            self._rows.append(row)
            self._rewrite()
        else:
            self._rows.append(row)
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
                file.flush()
                os.fsync(file.fileno())

    @rank_zero_only
    def forget_after(self, step: int) -> None:
        """Drop the rows of steps after ``step``: a run that resumes there writes them again."""
        kept = [row for row in self._rows if row["step"] <= step]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._rewrite()

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)

    def _drop_half_a_line(self) -> None:
        """A line without its end was being written when the machine died."""
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


def _plain(value: Any) -> float | int:
    return value.item() if hasattr(value, "item") else value
