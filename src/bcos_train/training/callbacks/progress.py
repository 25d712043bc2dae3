"""Progress and remaining time: a bar in a terminal, otherwise lines."""

import time

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from bcos_train.dataset.batch import Batch
from bcos_train.training.module import Classifier


class ProgressDisplay(pl.Callback):
    """Shows progress within an epoch, and a line with the results of each epoch.

    The remaining time is extrapolated from the time per step so far, including validations.
    """

    def __init__(self, console: Console, line_every_s: float = 30.0) -> None:
        self.console, self.line_every_s = console, line_every_s
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._first_batch = 0
        self._started = self._line_at = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._started = self._line_at = time.monotonic()
        self._first_batch = self._batches_done(trainer, 0) + trainer.fit_loop.batch_idx + 1
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
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
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
            epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._print(f"{epoch}  batch {batch_idx + 1}/{trainer.num_training_batches}  {state}")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics = trainer.callback_metrics
        labels = {
            "train loss": "train/loss",
            "acc1": "train/acc1",
            "f1": "train/f1",
            "val loss": "val/loss",
            "val acc1": "val/acc1",
            "val f1": "val/f1",
            "worst group": "val/worst_group_acc1",
            "energy pointing": "explanation/energy_pointing",
            "ema acc1": "val_ema/acc1",
            "ema f1": "val_ema/f1",
        }
        width = len(str(trainer.max_epochs))
        parts = [f"{label} {float(metrics[key]):6.4g}" for label, key in labels.items() if key in metrics]
        eta = self._eta(trainer, int(trainer.num_training_batches))
        epoch = f"epoch {trainer.current_epoch + 1:{width}d}/{trainer.max_epochs}"
        self._print("  ".join([epoch, *parts, f"ETA {eta}"]))
        self._line_at = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

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
        in_this_process = max(done - self._first_batch, 1)
        return duration((time.monotonic() - self._started) / in_this_process * (total - done))


def duration(seconds: float) -> str:
    """Format seconds as ``2:03``, ``1:02:03`` or ``3 d 01:02:03``."""
    days, rest = divmod(max(int(seconds + 0.5), 0), 86400)
    hours, minutes, s = rest // 3600, rest // 60 % 60, rest % 60
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}:{s:02d}"
    return f"{hours}:{minutes:02d}:{s:02d}" if hours else f"{minutes}:{s:02d}"
