"""Exponential moving average of the weights, validated alongside the model."""

from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from timm.utils import ModelEmaV3
from torch import nn

from bcos_train.dataset.batch import Batch
from bcos_train.nn import cached_weights
from bcos_train.runs.checkpoint import Checkpoint
from bcos_train.training.distributed import broadcast_buffers
from bcos_train.training.module import Classifier
from bcos_train.training.score import ClassificationScore, MultiLabelScore


@dataclass(frozen=True)
class Ema:
    """Options of the moving average.

    Args:
        decay: Decay per update, before it is adapted to the length of the run (see :func:`ema_decay`).
        every_n_steps: Optimizer steps between updates.

    Raises:
        ValueError: ``decay`` outside [0, 1) or ``every_n_steps`` below 1.
    """

    decay: float
    every_n_steps: int = 32

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay={self.decay}: at least 0 and less than 1")
        if self.every_n_steps < 1:
            raise ValueError(f"ema.every_n_steps={self.every_n_steps}: at least 1")


def ema_decay(decay: float, global_batch_size: int, every_n_steps: int, max_epochs: int) -> float:
    """Adapt the decay per update to batch size and length, as in torchvision's reference and the official code.

    ``1 - min(1, (1 - decay) * global_batch_size * every_n_steps / max_epochs)``: the average spans the same fraction
    of the run, regardless of the number of steps.
    """
    return 1.0 - min(1.0, (1.0 - decay) * global_batch_size * every_n_steps / max_epochs)


class EmaCallback(pl.Callback):
    """Updates the average, validates it after the model and saves it as ``model_ema``.

    Args:
        decay: Decay per update.
        every_n_steps: Optimizer steps between updates.
        warmup_steps: Each update up to the first one at or after this step copies the weights: averaging begins at the
            end of the learning rate's warm-up.
    """

    def __init__(self, decay: float, every_n_steps: int, warmup_steps: int) -> None:
        self.decay, self.every_n_steps, self.warmup_steps = decay, every_n_steps, warmup_steps
        self.ema: ModelEmaV3 | None = None
        self.score: ClassificationScore | MultiLabelScore = ClassificationScore()
        self._updated_at = -1

    @property
    def model(self) -> nn.Module:
        """The averaged model, in evaluation mode."""
        assert self.ema is not None, "the average is created by setup"
        return self.ema.module

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Classifier)
        if stage == "fit":
            self.ema = ModelEmaV3(pl_module.model, decay=self.decay)
            self.ema.requires_grad_(False)
            self.score = pl_module.new_val_score()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.model.to(pl_module.device)
        self.score.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # With accumulation several batches end at the same optimizer step, and the first ones at step 0.
        if step in (0, self._updated_at) or step % self.every_n_steps:
            return
        assert self.ema is not None
        assert isinstance(pl_module, Classifier)
        self._updated_at = step
        if step - self.every_n_steps < self.warmup_steps:
            self.ema.set(pl_module.model)
        else:
            self.ema.update(pl_module.model)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.score.reset()
        broadcast_buffers(self.model)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: object,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Classifier)
        with trainer.precision_plugin.val_step_context(), cached_weights(self.model):
            logits = self.model(pl_module.encode(batch.images))
        pl_module.update_val_score(self.score, logits, batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        score = self.score.compute()
        pl_module.log_now({f"val_ema/{key}": value for key, value in score.items() if key != "count"})

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        checkpoint["model_ema"] = self.model.state_dict()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        self.model.load_state_dict(checkpoint["model_ema"])

    def state_dict(self) -> dict[str, object]:
        return {"updated_at": self._updated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._updated_at = state_dict["updated_at"]
