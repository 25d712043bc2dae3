"""Training: the LightningModule, its callbacks and the wiring of a run."""

from bcos_train.training.callbacks.checkpoint import Checkpointing
from bcos_train.training.callbacks.ema import Ema
from bcos_train.training.loggers import tensorboard_logger, wandb_logger
from bcos_train.training.module import Classifier, NonFiniteLoss
from bcos_train.training.options import TrainerOptions

__all__ = [
    "Checkpointing",
    "Classifier",
    "Ema",
    "NonFiniteLoss",
    "TrainerOptions",
    "tensorboard_logger",
    "wandb_logger",
]
