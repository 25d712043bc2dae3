"""The top-level keys of ``configs/train.yaml`` and ``configs/evaluate.yaml``, built."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pytorch_lightning.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from bcos_train.augmentation import Augmentation
from bcos_train.dataset import BcosEncoding, ImageSource, Standardize
from bcos_train.evaluation import ExplanationOptions
from bcos_train.schedule import Schedule
from bcos_train.training.callbacks.checkpoint import Checkpointing
from bcos_train.training.callbacks.ema import Ema
from bcos_train.training.options import TrainerOptions

__all__ = ["CommonConfig", "EvaluateConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Model and data: what training and evaluation both build.

    Args:
        model: Builds the model; called with ``num_classes``.
        encoding: RGB in [0, 1] -> model input.
        eval_loss: ``(logits, target) -> scalar`` of the validation.
        batch_size: Images per optimizer step, over all devices.
        limit_train, limit_val: Use only this many images, always the same ones; ``None``: all. For trials.
        num_workers: Loading processes of each process; ``None``: from the number of cores.
        seed: Seeds weight initialization, data order, augmentation and per-step randomness.
        plugins: Modules of the user that register models and targets; imported before the config is validated.
    """

    model: Callable[..., nn.Module]
    dataset: ImageSource
    augmentation: Augmentation
    encoding: BcosEncoding | Standardize
    eval_loss: nn.Module
    trainer: TrainerOptions
    batch_size: int
    explanation: ExplanationOptions | None = None
    limit_train: int | None = None
    limit_val: int | None = None
    num_workers: int | None = None
    seed: int = 42
    plugins: Sequence[str] = ()

    @classmethod
    def keys_of(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a config that this class takes."""
        names = {field.name for field in fields(cls)}
        return {key: value for key, value in config.items() if key in names}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonConfig):
    """The keys of ``configs/train.yaml``.

    Args:
        loss: ``(logits, target) -> scalar`` of training.
        name: Free text at the beginning of the run folder's name.
        runs: Folder of all runs.
        resume: Resume the run that has the same config; otherwise use a new folder.
    """

    loss: nn.Module
    optimizer: Callable[..., Optimizer]
    schedule: Schedule
    checkpointing: Checkpointing
    ema: Ema | None = None
    logger: dict[str, Callable[..., Logger]] | None = None
    name: str = "default"
    runs: str = "runs"
    resume: bool = True


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrainConfig):
    """The keys of ``configs/evaluate.yaml``: those of training, of which an evaluation builds the common ones, and:

    Args:
        run: Run folder whose config and checkpoint are used.
        checkpoint: ``best``, ``last`` or a path.
        weights: Without ``run``: ``official``, or the path of a checkpoint, a ``.safetensors`` or ``.pth`` file or a
            folder with ``model.safetensors``.
        use_ema: Use the averaged weights; ``None``: if there are any.
        output: Folder for the results; ``None``: the run folder, or ``evaluations/<model>``.
    """

    run: str | None = None
    checkpoint: str = "best"
    weights: str | None = None
    use_ema: bool | None = None
    output: str | None = None
