"""Explanation quality beside accuracy, while training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn

from bcos_train.dataset.data_module import DataModule
from bcos_train.explanation import constant_term, evaluating, explain
from bcos_train.metric import completeness_error, cosine_alignment
from bcos_train.model import BcosModel
from bcos_train.report import gallery, save_gallery
from bcos_train.training.logging import log_now
from bcos_train.training.module import Classifier


@dataclass(frozen=True)
class ExplanationLogging:
    """What is logged about explanations, and how often.

    Args:
        every_n_epochs: Epochs between logs; the last epoch is always logged.
        gallery_images: Validation images in the gallery; 0 for none.
        metric_images: Validation images for completeness error and alignment; 0 for none.

    Raises:
        ValueError: A number below its minimum.
    """

    every_n_epochs: int = 1
    gallery_images: int = 12
    metric_images: int = 16

    def __post_init__(self) -> None:
        for key, least in (("every_n_epochs", 1), ("gallery_images", 0), ("metric_images", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"explanation.{key}={getattr(self, key)}: at least {least}")


def explanation_metrics(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Mean completeness error and mean |cos| of all layers and of each, for the predicted classes.

    ``x`` is ``(N, 6, H, W)``. Keys: ``completeness_error``, ``alignment`` and ``alignment/<layer>``.
    """
    result = explain(model, x)
    logit = result.logits.gather(1, result.target[:, None])[:, 0]
    error = completeness_error(logit, result.contribution_map.sum((1, 2)), constant_term(model, x, result.target))
    layers = cosine_alignment(model, x)
    return {
        "completeness_error": error.mean().item(),
        "alignment": sum(layers.values()) / len(layers),
        **{f"alignment/{name}": value for name, value in layers.items()},
    }


def draw_gallery(
    module: Classifier, model: nn.Module, images: Tensor, labels: Tensor, data: DataModule, **headline: Any
) -> Figure:
    """The gallery of uint8 ``images`` (N, 3, H, W) as ``model`` explains its predictions."""
    x = module.encode(images)
    result = explain(model, x)
    probabilities = module.loss.probabilities(result.logits)  # type: ignore[operator]
    # A model may have more classes than the data set.
    names = data.class_names + [f"class {k}" for k in range(data.num_classes, result.logits.shape[1])]
    return gallery(x, result, labels, names, probabilities=probabilities, max_samples=len(x), **headline)


class ExplanationCallback(pl.Callback):
    """After an epoch, on rank 0: metrics to the loggers, a gallery into ``folder`` and to the loggers.

    The images are the same in every run on a data set. Training isn't touched: the model is in evaluation mode, and
    no random number is drawn that anything else depends on.
    """

    def __init__(self, options: ExplanationLogging, folder: Path, title: str) -> None:
        self.options, self.folder, self.title = options, folder, title
        self._samples: tuple[Tensor, Tensor] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        is_due = epoch % self.options.every_n_epochs == 0 or epoch == trainer.max_epochs
        assert isinstance(pl_module, Classifier)
        is_on = self.options.gallery_images or self.options.metric_images
        if not is_on or not is_due or not isinstance(pl_module.model, BcosModel):
            return
        with evaluating(pl_module.model):
            self._log(trainer, pl_module, epoch)

    def _log(self, trainer: pl.Trainer, pl_module: Classifier, epoch: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        images, labels = self._load(data, pl_module.device)
        if n := self.options.metric_images:
            metrics = explanation_metrics(pl_module.model, pl_module.encode(images[:n]))
            log_now(pl_module, {f"explanation/{key}": value for key, value in metrics.items()})
        if n := self.options.gallery_images:
            accuracy = trainer.callback_metrics.get("val/acc1")
            headline = {
                "run_name": self.title,
                "epoch": epoch,
                "accuracy": None if accuracy is None else float(accuracy) / 100,
            }
            figure = draw_gallery(pl_module, pl_module.model, images[:n], labels[:n], data, **headline)
            path = self.folder / f"epoch-{epoch:04d}.png"
            save_gallery(path, figure)
            self._send(trainer, figure, path)

    def _load(self, data: DataModule, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._samples is None:
            self._samples = data.fixed_val_samples(max(self.options.gallery_images, self.options.metric_images))
        images, labels = self._samples
        return images.to(device), labels.to(device)

    @staticmethod
    def _send(trainer: pl.Trainer, figure: Figure, path: Path) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("explanation/gallery", [str(path)], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("explanation/gallery", figure, trainer.global_step, close=False)
