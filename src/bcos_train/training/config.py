"""The instantiated top-level keys of ``configs/train.yaml`` and ``configs/evaluate.yaml``."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

from pytorch_lightning.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from bcos_train.augmentation import Augmentation
from bcos_train.config.containers import Config
from bcos_train.config.errors import UserError
from bcos_train.config.targets import resolve
from bcos_train.dataset import BcosEncoding, ImageSource, Standardize
from bcos_train.distillation import DistillationOptions
from bcos_train.distillation.store import MapDtype
from bcos_train.evaluation import ExplanationOptions
from bcos_train.guidance import GuidanceOptions
from bcos_train.runs.folder import Resume
from bcos_train.schedule import Schedule
from bcos_train.training.callbacks.checkpoint import Checkpointing
from bcos_train.training.callbacks.ema import Ema
from bcos_train.training.options import TrainerOptions

__all__ = [
    "CommonConfig",
    "EvaluateConfig",
    "PrecomputeConfig",
    "TrainConfig",
    "find_moved_dataset",
    "restore_dataset_settings",
]

#: Settings in the config group ``explanation`` that depend on the data set, as they depend on the size of its images.
DATASET_SETTINGS = (("grid_pointing", "n"), ("grid_pointing", "smooth"), ("perturbation", "block"))


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Keys that both training and evaluation instantiate: model, data, trainer.

    Args:
        model: Builds the model; called with ``num_classes``.
        dataset: Training and validation images, with the names of the classes.
        augmentation: Transforms of single images in training and validation, and MixUp and CutMix of batches.
        encoding: RGB in [0, 1] -> model input.
        eval_loss: ``(logits, target) -> scalar`` for validation; its ``probabilities`` convert logits to confidences.
        trainer: Epochs, devices, precision, gradient clipping, compilation.
        batch_size: Images per optimizer step, over all devices.
        drop_last: Drop the last batch of an epoch if it is smaller than ``batch_size``.
        explanation: Explanation metrics and galleries; ``None`` (the default): none.
        limit_train, limit_val: Use only this many images, always the same ones; ``None``: all. For trials.
        num_workers: Data loading processes of each process; ``None``: its share of the cores minus one, and 0 with at
            most two cores.
        seed: Seeds weight initialization, data order, augmentation and per-step randomness; 42 by default.
        plugins: Modules of the user that register models and targets, imported before the config is validated.

    Raises:
        UserError: ``seed`` is out of range.
    """

    model: partial[nn.Module]
    dataset: ImageSource
    augmentation: Augmentation
    encoding: BcosEncoding | Standardize
    eval_loss: nn.Module
    trainer: TrainerOptions
    batch_size: int
    drop_last: bool = False
    explanation: ExplanationOptions | None = None
    limit_train: int | None = None
    limit_val: int | None = None
    num_workers: int | None = None
    seed: int = 42
    plugins: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed}: must lie between 0 and {2**32 - 1}")

    @property
    def model_name(self) -> str:
        """Name of the model: the argument ``name`` of ``model``."""
        return str(self.model.keywords["name"])

    @property
    def num_classes(self) -> int | None:
        """The argument ``num_classes`` of ``model``, or None."""
        num_classes: int | None = self.model.keywords.get("num_classes")
        return num_classes

    @classmethod
    def select(cls, config: Mapping[str, object]) -> dict[str, object]:
        """Return the entries of a config that are fields of this class."""
        names = {field.name for field in fields(cls)}
        return {key: value for key, value in config.items() if key in names}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommonConfig):
    """The keys of ``configs/train.yaml``.

    Args:
        loss: ``(logits, target) -> scalar`` for training.
        optimizer: Builds the optimizer; called with the parameters that are trained.
        schedule: Learning rate of each optimizer step, derived from the optimizer's ``lr``.
        checkpointing: When checkpoints are saved, and which are kept.
        distillation: Teacher and losses; ``None`` (the default): no teacher.
        guidance: Localization loss of explanations; ``None`` (the default): none.
        ema: Moving average of the weights, which is validated and saved too; ``None`` (the default): no average.
        logger: Builds the loggers besides ``metrics.csv``, by name; each is called with ``folder`` and ``run_id``.
        name: Prefix of the run folder's name: ``<runs>/<dataset>/<model>/<name>-<hash>``.
        runs: Folder of all runs; a relative path starts at the current folder.
        resume: Resume the run that has the same config; False: use a new folder; ``"adopt"``: also from a checkpoint
            without a checksum, if it can be read; ``"data_changed"``: if the images changed, too, with the new ones.
    """

    loss: nn.Module
    optimizer: partial[Optimizer]
    schedule: Schedule
    checkpointing: Checkpointing
    distillation: DistillationOptions | None = None
    guidance: GuidanceOptions | None = None
    ema: Ema | None = None
    logger: dict[str, Callable[..., Logger]] | None = None
    name: str = "default"
    runs: str = "runs"
    resume: Resume = True


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TrainConfig):
    """The keys of ``configs/evaluate.yaml``. Of the keys of training, only the common ones are instantiated.

    Args:
        run: Run folder whose config and checkpoint are used; ``None``: evaluate ``weights``.
        checkpoint: Checkpoint of the run: ``best`` (the default), ``last`` or a path.
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


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(TrainConfig):
    """The keys of ``configs/precompute_teacher.yaml``. Model, loss, optimizer and logger of the training aren't used.

    Args:
        out: Folder for the teacher's logits and maps.
        size: Side of the maps in pixels, at most that of the images.
        dtype: Type in which maps are stored.
        verify: Read the shards that are there again, and compute those that are damaged.

    Raises:
        UserError: ``size`` or ``dtype`` is wrong.
    """

    out: str
    size: int = 56
    dtype: MapDtype = "float16"
    verify: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < 1:
            raise UserError(f"size={self.size}: at least 1 pixel")
        if self.dtype not in ("float16", "float32"):
            raise UserError(f"dtype={self.dtype}: float16 or float32")


def restore_dataset_settings(config: Config, run_config: Config, overridden: Sequence[str]) -> Config:
    """Restore settings of a run's data set after overriding the group ``explanation``.

    The group is composed with the data set of the command line, which differs from the run's if only ``run=…`` is
    given. Settings overridden on the command line, or by a data set there, are kept.

    Args:
        config: Config of the run, overlaid with the command line.
        run_config: Config of the run.
        overridden: Keys and groups on the command line.
    """
    result = copy.deepcopy(dict(config))
    for group, key in DATASET_SETTINGS:
        value = ((run_config.get("explanation") or {}).get(group) or {}).get(key)
        is_overridden = not {"dataset", f"explanation.{group}.{key}"}.isdisjoint(overridden)
        if "explanation" in overridden and not is_overridden and value is not None:
            result["explanation"][group][key] = value
    return result


def find_moved_dataset(dataset: Config) -> Config:
    """Return a run's ``dataset`` node with the folder in the data set's environment variable, if that is set.

    As in training, ``DATA_ROOT`` or ``IMAGENET_PATH`` names the folder on this machine; the run's may be elsewhere.
    """
    target = dataset.get("_target_")
    variable = getattr(resolve(target, "dataset"), "root_variable", None) if "root" in dataset else None
    root = os.environ.get(variable) if variable else None
    return {**dataset, "root": root} if root else dict(dataset)
