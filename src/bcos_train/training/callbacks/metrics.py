"""Metrics during training, and ``metrics.csv``."""

import csv
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from bcos_train.dataset.batch import Batch
from bcos_train.runs.checkpoint import Checkpoint
from bcos_train.runs.layout import METRICS, salvage_metrics
from bcos_train.training.distributed import means_over_processes, sum_over_processes
from bcos_train.training.module import Classifier
from bcos_train.utils.atomic import atomic_write, unused_path
from bcos_train.utils.terminal import printable

_logger = logging.getLogger(__name__)


class CsvLogger(Logger):
    """Logs to ``metrics.csv`` in the run folder: a row for each step with metrics.

    Rows are appended; the file is rewritten only for a new column, or to add metrics to the last row. Logged metrics
    are flushed to disk at once: no step before a checkpoint is missing in the file.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = Path(folder) / METRICS
        self._columns: list[str] = []
        self._rows: list[dict[str, float]] = []
        self._load()

    @rank_zero_only
    def _load(self) -> None:
        """Read the rows of a run that resumes; a damaged file is kept under another name, and replaced."""
        if not self.path.exists():
            return
        if self.path.is_file() and not self.path.is_symlink():
            self._drop_incomplete_line()
        self._columns, self._rows, problem = salvage_metrics(self.path)
        if problem is not None:
            aside = unused_path(self.path.with_name(f"{METRICS}.damaged"))
            self.path.rename(aside)
            self._rewrite()
            _logger.warning(
                "%s is damaged (%s): %d rows were kept, the damaged one is now %s",
                printable(str(self.path)),
                problem,
                len(self._rows),
                aside.name,
            )

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
        """Do nothing: the run folder contains the config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        row = {"step": step} | {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        new_columns = [key for key in row if key not in self._columns]
        self._columns += new_columns
        if self._rows and self._rows[-1]["step"] == step and self._rows[-1].get("epoch") == row.get("epoch"):
            self._rows[-1].update(row)
            self._rewrite()
        elif new_columns or not self.path.exists():
            self._rows.append(row)
            self._rewrite()
        else:
            self._rows.append(row)
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)
                file.flush()
                os.fsync(file.fileno())

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Drop the rows of steps after ``step``: a run that resumes there writes them again."""
        rows = [row for row in self._rows if row["step"] <= step]
        if len(rows) < len(self._rows):
            self._rows = rows
            self._rewrite()

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)

    def _drop_incomplete_line(self) -> None:
        """Drop a last line without a line break, which was being written when the machine failed."""
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)


class TrainingLog(pl.Callback):
    """Logs step metrics every ``log_every_n_steps`` optimizer steps, and loss and accuracy of each epoch.

    ``train/loss_step``, ``lr`` and ``gradient_norm`` (before clipping) in the row of step n are those of the n-th
    optimizer step, counted from 1; its learning rate is the schedule's at n - 1.
    """

    def __init__(self) -> None:
        self._images = 0
        self._started = 0.0
        self._losses: list[float] = []
        self._lr = float("nan")

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.drop_after(checkpoint["global_step"])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._images == 0:
            self._started = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._lr = float(optimizer.param_groups[0]["lr"])  # the scheduler changes it before the batch ends

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        self._images += len(batch.images) * trainer.world_size
        self._losses.append(pl_module.last_loss)
        if (batch_idx + 1) % trainer.accumulate_grad_batches and batch_idx + 1 < trainer.num_training_batches:
            return
        loss, self._losses = sum(self._losses) / len(self._losses), []
        step, every = trainer.global_step, pl_module.log_every_n_steps
        if step % every:
            return
        seconds = time.perf_counter() - self._started
        metrics = {
            "train/loss_step": loss,
            "lr": self._lr,
            "images_per_second": self._images / seconds,
        }
        if pl_module.gradient_norm is not None:
            metrics["gradient_norm"] = float(pl_module.gradient_norm)
        terms = means_over_processes(pl_module.task_logs, pl_module.device)
        metrics |= {f"train/{name}": value for name, value in terms.items()}
        pl_module.log_now(metrics)
        self._images = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._images = 0  # restarts the clock: the throughput excludes validations

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        score = pl_module.train_score.compute()
        pl_module.train_score.reset()
        pl_module.log_now({f"train/{key}": value for key, value in score.items() if key != "count"})
        skipped = sum_over_processes(pl_module.data.count_skipped("train"), pl_module.device)
        if skipped:
            pl_module.log_now({"data/skipped": skipped})
