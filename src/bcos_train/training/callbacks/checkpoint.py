"""When to save, what to keep, and leaving when asked to."""

import glob
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from bcos_train.evaluation.store import write_json
from bcos_train.runs import checkpoint as files
from bcos_train.runs.interrupt import Interrupted, StopFlag
from bcos_train.runs.launch import SIGNALS
from bcos_train.runs.layout import BEST, CHECKPOINT_SUFFIX, LAST
from bcos_train.training.distributed import is_distributed, largest
from bcos_train.training.module import Classifier
from bcos_train.utils.suggestions import join_words, suggest


@dataclass(frozen=True)
class Checkpointing:
    """When checkpoints are written and which are kept.

    Args:
        monitor: Metric by which the best are kept; ``None`` keeps none.
        mode: Whether the best is the largest (``"max"``) or smallest value.
        keep_best: How many of the best to keep.
        every_n_epochs: Epochs between saves of ``last.ckpt``.
        every_n_steps: Optimizer steps between saves within an epoch; ``None``: none by count.
        every_n_minutes: Minutes between saves within an epoch; ``None``: none by time.

    Raises:
        ValueError: A number below its minimum.
    """

    monitor: str | None = "val/acc1"
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


class UnknownMonitor(ValueError):
    """``checkpointing.monitor`` is nothing that this run logs."""


class Checkpointer(Checkpoint):
    """Writes ``last.ckpt`` and the best ones into ``folder`` at the ends of optimizer steps and of epochs.

    The last batch of an epoch is followed by the validation, and what belongs to the epoch is saved together after it.
    """

    def __init__(self, folder: Path, options: Checkpointing, stop: StopFlag) -> None:
        self.folder, self.options, self.stop = folder, options, stop
        #: The best so far, best first: file name, score, epoch.
        self.best: list[dict[str, Any]] = []
        self._has_scored = False
        self._saved_at_time = time.monotonic()

    @property
    def last(self) -> Path:
        return self.folder / LAST

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install_handlers()
        self._saved_at_time = time.monotonic()
        assert isinstance(pl_module, Classifier)
        pl_module.votes = self._votes
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            self._restore_best(Path(trainer.ckpt_path), trainer.global_step, pl_module.steps_per_epoch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n = batch_idx + 1
        if n == trainer.num_training_batches or n % trainer.accumulate_grad_batches:
            return
        assert isinstance(pl_module, Classifier)
        # Clocks and signals differ between processes; all must save, or leave, at the same step. With several, what
        # counts is what they knew when the loss was read; alone, what is known now.
        is_time, *is_sent = pl_module.cast_votes if is_distributed() else self._votes()
        signum = max((number for number, sent in zip(SIGNALS, is_sent, strict=True) if sent), default=0)
        self._save_if(trainer, pl_module, is_time or self._is_step(trainer), signum)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        done = trainer.current_epoch + 1
        is_end = done == trainer.max_epochs
        score = pl_module.epoch_metrics.get(self.options.monitor or "")
        self._has_scored |= score is not None
        name = None
        if score is not None and self._ranks(score):
            # No "=" in it: the path can be given as it is, checkpoint=<path>.
            name = f"epoch-{done:04d}-{self._monitor_in_names}-{score:.4f}{CHECKPOINT_SUFFIX}"
            self.best.append({"file": name, "score": score, "epoch": done})
            self.best.sort(key=lambda entry: entry["score"], reverse=self.options.mode == "max")
        due = name is not None or done % self.options.every_n_epochs == 0 or is_end
        due = due or self._is_step(trainer) or self._is_time()
        complaint = self._unknown_monitor(trainer, pl_module.epoch_metrics) if not self._has_scored else None
        is_unknown = largest(int(complaint is not None), trainer.strategy.root_device)
        # Once all epochs are done there is nothing left to stop.
        signum = largest(0 if is_end else self.stop.signum or 0, trainer.strategy.root_device)
        due = bool(is_unknown or largest(int(due), trainer.strategy.root_device))
        self._save_if(trainer, pl_module, due, signum, name)
        if is_unknown:
            raise UnknownMonitor(complaint)

    def _is_step(self, trainer: pl.Trainer) -> bool:
        """True if a checkpoint is due by count: the same in all processes."""
        steps = self.options.every_n_steps
        return steps is not None and trainer.global_step % steps == 0

    def _is_time(self) -> bool:
        """True if a checkpoint is due by this process's clock."""
        minutes = self.options.every_n_minutes
        return minutes is not None and time.monotonic() - self._saved_at_time >= 60 * minutes

    def _votes(self) -> list[bool]:
        """For :attr:`Classifier.votes`: whether it is time to save, and whether each of the signals was received."""
        return [self._is_time(), *(self.stop.signum == number for number in SIGNALS)]

    def _save_if(
        self, trainer: pl.Trainer, module: pl.LightningModule, due: bool, signum: int, best: str | None = None
    ) -> None:
        """Save if it is due or a signal asks for a stop, and then stop; both are the same in all processes."""
        if not (signum or due):
            return
        assert isinstance(module, Classifier)
        module.stop_if_not_finite_weights()
        dropped = self.best[self.options.keep_best :]
        self.best = self.best[: self.options.keep_best]
        trainer.save_checkpoint(self.last)
        self._saved_at_time = time.monotonic()
        if trainer.is_global_zero:
            if best is not None:
                files.copy(self.last, self.folder / best)
            for entry in dropped:
                files.delete(self.folder / entry["file"])
            self._write_best()
        if signum:
            raise Interrupted(signum)

    def _unknown_monitor(self, trainer: pl.Trainer, logged: dict[str, float]) -> str | None:
        """What is wrong with ``monitor``, once an epoch with a validation hasn't logged it."""
        monitor = self.options.monitor
        groups = {key.partition("/")[0] for key in logged}
        if monitor is None or self.options.keep_best == 0 or not trainer.is_global_zero or "val" not in groups:
            return None
        # Explanation metrics may be rarer than validations; the last epoch has both.
        is_rare = monitor.startswith("explanation/") and "explanation" not in groups
        if is_rare and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            return None
        return (
            f"checkpointing.monitor={monitor}: nothing of that name is logged{suggest(monitor, logged)} "
            f"(logged are {join_words(sorted(logged), 'and')})"
        )

    def _ranks(self, score: float) -> bool:
        if self.options.keep_best == 0 or not math.isfinite(score):
            return False
        if len(self.best) < self.options.keep_best:
            return True
        worst = self.best[-1]["score"]
        return score > worst if self.options.mode == "max" else score < worst

    def _restore_best(self, source: Path, steps: int, steps_per_epoch: int) -> None:
        """Make the list and the files agree again with the state of ``source``, from which training goes on.

        They differ if the process was killed between the two, or if ``source`` is older than the newest checkpoint.
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

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.options.monitor, "mode": self.options.mode, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Scores of another metric can't be compared with this one's; those files are left where they are.
        if (state_dict["monitor"], state_dict["mode"]) == (self.options.monitor, self.options.mode):
            self.best = list(state_dict["best"])
            self._has_scored = bool(self.best)
