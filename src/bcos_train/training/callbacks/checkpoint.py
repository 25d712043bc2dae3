"""Checkpoint callback: schedule, retention, graceful stop."""

import glob
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from bcos_train.runs import checkpoint as files
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.runs.launch import SIGNALS
from bcos_train.runs.layout import BEST, CHECKPOINT_SUFFIX, LAST, check_checkpoint_name
from bcos_train.training.distributed import is_distributed, max_over_processes
from bcos_train.training.module import Classifier
from bcos_train.utils.files import write_json
from bcos_train.utils.suggestions import join_words, suggest


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are saved and which are kept.

    Args:
        monitor: Metric that selects the best checkpoints; ``"auto"``: ``val/f1`` with several labels per image, else
            ``val/acc1``; ``None`` keeps none.
        mode: ``"max"`` if larger values of the metric are better, ``"min"`` if smaller ones are.
        keep_best: Number of best checkpoints to keep.
        every_n_epochs: Epochs between saves of ``last.ckpt``.
        every_n_steps: Optimizer steps between saves within an epoch; ``None``: not by steps.
        every_n_minutes: Minutes between saves within an epoch; ``None``: not by time.

    Raises:
        ValueError: A number below its minimum.
    """

    monitor: str | None = "auto"
    mode: Literal["max", "min"] = "max"
    keep_best: int = 1
    every_n_epochs: int = 1
    every_n_steps: int | None = None
    every_n_minutes: float | None = 15.0

    def __post_init__(self) -> None:
        if self.keep_best < 0:
            raise ValueError(f"checkpointing.keep_best={self.keep_best}: at least 0")
        for key in ("every_n_epochs", "every_n_steps"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ValueError(f"checkpointing.{key}={value}: at least 1")
        if self.every_n_minutes is not None and self.every_n_minutes <= 0:
            raise ValueError(f"checkpointing.every_n_minutes={self.every_n_minutes}: more than 0, or null")

    def resolve_monitor(self, is_multi_label: bool) -> "Checkpointing":
        """Replace ``monitor="auto"`` by the metric for the labels of the data set."""
        return replace(self, monitor="val/f1" if is_multi_label else "val/acc1") if self.monitor == "auto" else self


class UnknownMonitor(ValueError):
    """``checkpointing.monitor`` is not logged by this run."""


class BestCheckpoint(TypedDict):
    """A checkpoint kept for its score."""

    file: str
    score: float
    epoch: int


class Checkpointer(Checkpoint):
    """Saves ``last.ckpt`` and the best checkpoints to ``folder`` after optimizer steps and epochs.

    After the last batch of an epoch the checkpoint is saved only once the validation has ended.
    """

    def __init__(self, folder: Path, options: Checkpointing, stop: StopFlag) -> None:
        self.folder, self.options, self.stop = folder, options, stop
        #: Best checkpoints so far, best first.
        self.best: list[BestCheckpoint] = []
        self._has_score = False
        self._saved_at = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Classifier)
        self.options = self.options.resolve_monitor(pl_module.is_multi_label)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install_handlers()
        self._saved_at = time.monotonic()
        assert isinstance(pl_module, Classifier)
        pl_module.votes = self._votes
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            self._restore_best(Path(trainer.ckpt_path), trainer.global_step, pl_module.steps_per_epoch)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        n_left = int(trainer.num_training_batches) - batch_idx
        # The last step of an epoch is saved with the epoch.
        when = "this step" if n_left > trainer.accumulate_grad_batches else "the end of this epoch"
        self.stop.response = f"saving after {when}, then stopping"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.response = "saving after this validation, then stopping"

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        n = batch_idx + 1
        if n == trainer.num_training_batches or n % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, Classifier)
        # Clocks and signals differ between processes, which must save and stop at the same step: the votes were reduced
        # with the loss. A single process uses its current state.
        is_time, *received = pl_module.reduced_votes if is_distributed() else self._votes()
        signum = max((number for number, is_received in zip(SIGNALS, received, strict=True) if is_received), default=0)
        self._save_if(trainer, pl_module, is_time or self._is_step(trainer), signum)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        done = trainer.current_epoch + 1
        is_end = done == trainer.max_epochs
        score = pl_module.epoch_metrics.get(self.options.monitor or "")
        self._has_score |= score is not None
        name = None
        if score is not None and self._is_among_best(score):
            # Without "=", so that the path needs no quoting in checkpoint=<path>.
            name = f"epoch-{done:04d}-{self._monitor_in_names}-{score:.4f}{CHECKPOINT_SUFFIX}"
            self.best.append({"file": name, "score": score, "epoch": done})
            self.best.sort(key=lambda entry: entry["score"], reverse=self.options.mode == "max")
        due = name is not None or done % self.options.every_n_epochs == 0 or is_end
        due = due or self._is_step(trainer) or self._is_time()
        error = self._monitor_error(trainer, pl_module.epoch_metrics) if not self._has_score else None
        is_unknown = max_over_processes(int(error is not None), trainer.strategy.root_device)
        # From here on the next chance to stop is the next step; after the last epoch there is nothing left to stop.
        self.stop.response = "all epochs are done, finishing" if is_end else "saving after the next step, then stopping"
        signum = max_over_processes(0 if is_end else self.stop.signum or 0, trainer.strategy.root_device)
        due = bool(is_unknown or max_over_processes(int(due), trainer.strategy.root_device))
        self._save_if(trainer, pl_module, due, signum, name)
        if is_unknown:
            raise UnknownMonitor(error)

    def _is_step(self, trainer: pl.Trainer) -> bool:
        """True if a checkpoint is due by the number of steps, which is the same in all processes."""
        steps = self.options.every_n_steps
        return steps is not None and trainer.global_step % steps == 0

    def _is_time(self) -> bool:
        """True if a checkpoint is due by this process's clock."""
        minutes = self.options.every_n_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _votes(self) -> list[bool]:
        """Return :attr:`Classifier.votes`: whether a checkpoint is due, and for each signal whether it was received."""
        return [self._is_time(), *(self.stop.signum == number for number in SIGNALS)]

    def _save_if(
        self, trainer: pl.Trainer, module: pl.LightningModule, due: bool, signum: int, best: str | None = None
    ) -> None:
        """Save if due or upon a signal, and then stop upon a signal. The arguments are the same in all processes."""
        if not (signum or due):
            return
        assert isinstance(module, Classifier)
        module.stop_if_not_finite_weights()
        dropped = self.best[self.options.keep_best :]
        self.best = self.best[: self.options.keep_best]
        trainer.save_checkpoint(self.folder / LAST)
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            if best is not None:
                files.copy(self.folder / LAST, self.folder / best)
            for entry in dropped:
                files.delete(self.folder / entry["file"])
            self._write_best()
        if signum:
            raise Interrupted(signum)

    def _monitor_error(self, trainer: pl.Trainer, logged: dict[str, float]) -> str | None:
        """Return an error message if an epoch with a validation hasn't logged ``monitor``."""
        monitor = self.options.monitor
        groups = {key.partition("/")[0] for key in logged}
        if monitor is None or self.options.keep_best == 0 or not trainer.is_global_zero or "val" not in groups:
            return None
        # Explanation metrics may be computed less often than validations; the last epoch has both.
        is_pending = monitor.startswith("explanation/") and "explanation" not in groups
        if is_pending and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            return None
        return (
            f"checkpointing.monitor={monitor}: no such metric is logged{suggest(monitor, logged)} "
            f"(logged are {join_words(sorted(logged), 'and')})"
        )

    def _is_among_best(self, score: float) -> bool:
        if self.options.keep_best == 0 or not math.isfinite(score):
            return False
        if len(self.best) < self.options.keep_best:
            return True
        worst = self.best[-1]["score"]
        return score > worst if self.options.mode == "max" else score < worst

    def _restore_best(self, source: Path, steps: int, steps_per_epoch: int) -> None:
        """Restore the list and the files of the best checkpoints to the state of ``source``, where training resumes.

        They differ if the process was killed between the two writes, or if ``source`` is not the newest checkpoint.
        """
        if self.best:
            pattern = f"epoch-*-{glob.escape(self._monitor_in_names)}-*{CHECKPOINT_SUFFIX}"
            for path in {*self.folder.glob(pattern)} - {self.folder / entry["file"] for entry in self.best}:
                files.delete(path)
        for entry in list(self.best):
            path = self.folder / entry["file"]
            if path.exists():
                continue
            if entry["epoch"] * steps_per_epoch == steps:
                files.copy(source, path)
            else:
                self.best.remove(entry)
        self._write_best()

    @property
    def _monitor_in_names(self) -> str:
        return (self.options.monitor or "").replace("/", "_")

    def _write_best(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / BEST, self.best)

    def state_dict(self) -> dict[str, object]:
        return {"monitor": self.options.monitor, "mode": self.options.mode, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Scores of different metrics can't be compared; the files of another metric are kept.
        if (state_dict["monitor"], state_dict["mode"]) == (self.options.monitor, self.options.mode):
            self.best = [
                {
                    "file": check_checkpoint_name(entry["file"]),
                    "score": float(entry["score"]),
                    "epoch": int(entry["epoch"]),
                }
                for entry in state_dict["best"]
            ]
            self._has_score = bool(self.best)
