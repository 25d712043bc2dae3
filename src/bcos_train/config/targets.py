"""What a config may name as ``_target_``.

The names are exact. A prefix such as ``torch.*`` would let a config from elsewhere run code: ``torch.load`` unpickles,
``torch.hub.load`` fetches and runs, ``torch.utils.collect_env.run`` is a shell.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from bcos_train.config.errors import UserError
from bcos_train.suggest import join_words, nearest

__all__ = ["TARGETS", "resolve"]

#: Each name is also the import path; it is imported when a config uses it.
TARGETS: tuple[str, ...] = (
    "bcos_train.augmentation.Augmentation",
    "bcos_train.augmentation.crop_flip",
    "bcos_train.augmentation.digits_train",
    "bcos_train.augmentation.imagenet_eval",
    "bcos_train.augmentation.imagenet_train",
    "bcos_train.augmentation.plain",
    "bcos_train.dataset.BcosEncoding",
    "bcos_train.dataset.Cifar10",
    "bcos_train.dataset.Digits",
    "bcos_train.dataset.ImageFolder",
    "bcos_train.dataset.ImageNet",
    "bcos_train.dataset.Standardize",
    "bcos_train.evaluation.ExplanationOptions",
    "bcos_train.evaluation.GridPointingOptions",
    "bcos_train.evaluation.PerturbationOptions",
    "bcos_train.evaluation.StabilityOptions",
    "bcos_train.loss.BinaryCrossEntropy",
    "bcos_train.loss.CrossEntropy",
    "bcos_train.loss.UniformOffLabelBinaryCrossEntropy",
    "bcos_train.model.create_model",
    "bcos_train.model.timm_model",
    "bcos_train.optimizer.timm_optimizer",
    "bcos_train.schedule.Constant",
    "bcos_train.schedule.Cosine",
    "bcos_train.schedule.Exponential",
    "bcos_train.schedule.Step",
    "bcos_train.training.Checkpointing",
    "bcos_train.training.Ema",
    "bcos_train.training.TrainerOptions",
    "bcos_train.training.tensorboard_logger",
    "bcos_train.training.wandb_logger",
    "torch.optim.Adam",
    "torch.optim.AdamW",
    "torch.optim.RMSprop",
    "torch.optim.SGD",
)


def resolve(name: object, path: str = "") -> Callable[..., Any]:
    """Import the object that ``name`` stands for; ``path`` is the config key of the node, for the message.

    Raises:
        UserError: ``name`` is not listed in :data:`TARGETS`, or a package that it needs is not installed.
    """
    key = f"{path}._target_" if path else "_target_"
    if not isinstance(name, str) or name not in TARGETS:
        near = _nearest_targets(str(name))
        hint = f"; did you mean {join_words(near)}?" if near else " (bcos_train.config.TARGETS lists what is)"
        raise UserError(f"{key}={name}: not a name that a config may use{hint}")
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        # A missing module of our own is a fault in the code and keeps its traceback.
        if (error.name or "").startswith("bcos_train"):
            raise
        raise UserError(f"{key}={name}: {error.name} is not installed") from error


def _nearest_targets(name: str) -> list[str]:
    """By the last part, since the module is easily wrong or left out."""
    by_last: dict[str, list[str]] = {}
    for target in TARGETS:
        by_last.setdefault(target.rpartition(".")[2], []).append(target)
    found = nearest(name.rpartition(".")[2], by_last)
    return [target for last in found for target in by_last[last]][:3]
