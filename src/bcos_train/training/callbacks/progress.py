"""Progress with the time that is left: a bar in a terminal, lines elsewhere."""

import time
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.optim import Optimizer

from bcos_train.dataset.batch import Batch
from bcos_train.training.callbacks.metrics import CsvLogger, log_now
from bcos_train.training.module import Classifier


class TrainingLog(pl.Callback):
    """Loss, learning rate, gradient norm and throughput every ``log_every_n_steps`` optimizer steps; loss and
    accuracy of each epoch.

    ``train/loss_step``, ``lr`` and ``gradient_norm`` (before clipping) in the row of step n are those of the n-th
    optimizer step, counted from 1; its rate is the schedule's at n - 1.
    """

    def __init__(self) -> None:
        self._images = 0
        self._started = 0.0
        self._losses: list[float] = []
        self._lr = float("nan")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CsvLogger):
                logger.forget_after(checkpoint["global_step"])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self._images == 0:
            self._started = time.perf_counter()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        self._lr = float(optimizer.param_groups[0]["lr"])  # at the end of the batch it is the next step's

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Classifier)
        self._images += len(batch[0]) * trainer.world_size
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
        metrics |= {f"train/{name}": float(value) for name, value in pl_module.task_logs.items()}
        log_now(pl_module, metrics)
        self._images = 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._images = 0  # the time of a validation is no training time

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        score = pl_module.train_score.compute()
        pl_module.train_score.reset()
        log_now(pl_module, {f"train/{key}": value for key, value in score.items() if key != "count"})


class ProgressDisplay(pl.Callback):
    """Where the run is, and a line with the results of each epoch.

    The time left is that of the steps left at the pace so far, validations included.
    """

    def __init__(self, console: Console, line_every_s: float = 30.0) -> None:
        self.console, self.line_every_s = console, line_every_s
        self._bar: Progress | None = None
        self._task: Any = None
        self._done_before = 0
        self._started = self._line_at = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._started = self._line_at = time.monotonic()
        self._done_before = self._batches_done(trainer, 0) + trainer.fit_loop.batch_idx + 1
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("", total=None, state="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, Classifier)
        state = f"loss {pl_module.last_loss:.4g}  ETA {self._eta(trainer, batch_idx + 1)}"
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
                completed=batch_idx + 1,
                total=trainer.num_training_batches,
                state=state,
            )
        elif time.monotonic() - self._line_at >= self.line_every_s:
            self._line_at = time.monotonic()
            place = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._line(f"{place}  batch {batch_idx + 1}/{trainer.num_training_batches}  {state}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        shown = {
            "train loss": "train/loss",
            "acc1": "train/acc1",
            "val loss": "val/loss",
            "val acc1": "val/acc1",
            "ema acc1": "val_ema/acc1",
        }
        width = len(str(trainer.max_epochs))
        parts = [f"{label} {float(metrics[key]):6.4g}" for label, key in shown.items() if key in metrics]
        eta = self._eta(trainer, int(trainer.num_training_batches))
        place = f"epoch {trainer.current_epoch + 1:{width}d}/{trainer.max_epochs}"
        self._line("  ".join([place, *parts, f"ETA {eta}"]))
        self._line_at = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _batches_done(trainer: pl.Trainer, in_epoch: int) -> int:
        return trainer.current_epoch * int(trainer.num_training_batches) + in_epoch

    def _eta(self, trainer: pl.Trainer, in_epoch: int) -> str:
        done = self._batches_done(trainer, in_epoch)
        total = int(trainer.max_epochs or 0) * int(trainer.num_training_batches)
        here = max(done - self._done_before, 1)
        return duration((time.monotonic() - self._started) / here * (total - done))


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``; days as ``3 d 01:02:03``."""
    whole = max(int(seconds + 0.5), 0)
    days, rest = divmod(whole, 86400)
    hours, minutes, s = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}:{s:02d}"
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
