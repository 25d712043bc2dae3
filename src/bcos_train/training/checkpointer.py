"""When to save, what to keep, and leaving when asked to."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from bcos_train.training import checkpoint as files
from bcos_train.training.distributed import largest
from bcos_train.training.interrupt import Interrupted, StopFlag

BEST = "best.json"


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


class Checkpointer(Checkpoint):
    """Writes ``last.ckpt`` and the best ones into ``folder`` at the ends of optimizer steps and of epochs.

    The last batch of an epoch is followed by the validation, and what belongs to the epoch is saved together after it.
    """

    def __init__(self, folder: Path, options: Checkpointing, stop: StopFlag) -> None:
        self.folder, self.options, self.stop = folder, options, stop
        #: The best so far, best first: file name, score, epoch.
        self.best: list[dict[str, Any]] = []
        self._saved_at_time = time.monotonic()

    @property
    def last(self) -> Path:
        return self.folder / files.LAST

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop.install()
        self._saved_at_time = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        n = batch_idx + 1
        if n == trainer.num_training_batches or n % trainer.accumulate_grad_batches:
            return
        minutes, steps = self.options.every_n_minutes, self.options.every_n_steps
        due = minutes is not None and time.monotonic() - self._saved_at_time >= 60 * minutes
        due |= steps is not None and trainer.global_step % steps == 0
        self._save_if(trainer, due)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        done = trainer.current_epoch + 1
        score = self._score(trainer)
        ranked = score is not None and self._ranks(score)
        due = ranked or done % self.options.every_n_epochs == 0 or done == trainer.max_epochs
        name = None
        if ranked:
            name = f"epoch={done:04d}-{(self.options.monitor or '').replace('/', '_')}={score:.4f}{files.SUFFIX}"
            self.best.append({"file": name, "score": score, "epoch": done})
            self.best.sort(key=lambda entry: entry["score"], reverse=self.options.mode == "max")
        # Once all epochs are done there is nothing left to stop.
        self._save_if(trainer, due, name, is_end=done == trainer.max_epochs)

    def _save_if(self, trainer: pl.Trainer, due: bool, best: str | None = None, is_end: bool = False) -> None:
        # Clocks and signals differ between processes; all must save, or leave, at the same step.
        signum = largest(0 if is_end else self.stop.signum or 0, trainer.strategy.root_device)
        if not (signum or largest(int(due), trainer.strategy.root_device)):
            return
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

    def _score(self, trainer: pl.Trainer) -> float | None:
        if self.options.monitor is None or self.options.keep_best == 0:
            return None
        metrics = trainer.callback_metrics
        if self.options.monitor not in metrics:
            raise ValueError(
                f"checkpointing.monitor={self.options.monitor} is not logged; logged are: {', '.join(sorted(metrics))}"
            )
        return float(metrics[self.options.monitor])

    def _ranks(self, score: float) -> bool:
        if len(self.best) < self.options.keep_best:
            return True
        worst = self.best[-1]["score"]
        return score > worst if self.options.mode == "max" else score < worst

    def _write_best(self) -> None:
        temporary = self.folder / f".{BEST}.tmp"
        temporary.write_text(json.dumps(self.best, indent=1))
        os.replace(temporary, self.folder / BEST)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = list(state_dict["best"])


def find_checkpoint(folder: Path, which: str) -> Path:
    """The file for ``last``, ``best`` or a path.

    Raises:
        ValueError: There is none.
    """
    if which == "last":
        path, complaints = files.newest_valid(folder)
        if path is None:
            raise ValueError("; ".join(complaints) or f"no checkpoint in {folder}")
        return path
    if which == "best":
        if not (folder / BEST).exists() or not (best := json.loads((folder / BEST).read_text())):
            raise ValueError(f"no best checkpoint in {folder}: take checkpoint=last")
        return folder / best[0]["file"]
    if not Path(which).is_file():
        raise ValueError(f"checkpoint={which}: no such file; give best, last or a path")
    return Path(which)
