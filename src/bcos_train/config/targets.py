"""Allow-list of ``_target_`` names.

Names are exact. A prefix such as ``torch.*`` would let an untrusted config run code: ``torch.load`` unpickles,
``torch.hub.load`` downloads and runs, ``torch.utils.collect_env.run`` is a shell.
"""

from collections.abc import Callable
from importlib import import_module

from bcos_train.config.errors import UserError
from bcos_train.utils.suggestions import join_words, nearest

__all__ = ["TARGETS", "resolve"]

#: Each name is also an import path, imported when a config uses it.
TARGETS: tuple[str, ...] = (
    "bcos_train.augmentation.Augmentation",
    "bcos_train.augmentation.crop_flip",
    "bcos_train.augmentation.digits_train",
    "bcos_train.augmentation.imagenet_eval",
    "bcos_train.augmentation.imagenet_train",
    "bcos_train.augmentation.plain",
    "bcos_train.dataset.BcosEncoding",
    "bcos_train.dataset.Cifar10",
    "bcos_train.dataset.Coco",
    "bcos_train.dataset.Digits",
    "bcos_train.dataset.ImageFolder",
    "bcos_train.dataset.ImageNet",
    "bcos_train.dataset.Pasted",
    "bcos_train.dataset.Standardize",
    "bcos_train.dataset.Voc2007",
    "bcos_train.dataset.Waterbirds",
    "bcos_train.distillation.DistillationOptions",
    "bcos_train.evaluation.ExplanationOptions",
    "bcos_train.evaluation.GridPointingOptions",
    "bcos_train.evaluation.PerturbationOptions",
    "bcos_train.evaluation.StabilityOptions",
    "bcos_train.guidance.GuidanceOptions",
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

#: Targets of plugins, see :func:`bcos_train.config.register_target`.
REGISTERED: dict[str, Callable[..., object]] = {}


def resolve(name: object, path: str = "") -> Callable[..., object]:
    """Return the class or function called ``name``, imported on first use.

    Args:
        name: Value of ``_target_``.
        path: Config key of the node, for the message.

    Raises:
        UserError: ``name`` is neither in :data:`TARGETS` nor registered, or a required package is not installed.
    """
    key = f"{path}._target_" if path else "_target_"
    if isinstance(name, str) and name in REGISTERED:
        return REGISTERED[name]
    if not isinstance(name, str) or name not in TARGETS:
        near = _nearest_targets(str(name))
        hint = f"; did you mean {join_words(near)}?" if near else " (see bcos_train.config.TARGETS)"
        raise UserError(f"{key}={name}: not an allowed name{hint}")
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        # A missing module of this package is a bug and keeps its traceback.
        if (error.name or "").startswith("bcos_train"):
            raise
        raise UserError(f"{key}={name}: {error.name} is not installed") from error


def _nearest_targets(name: str) -> list[str]:
    """Return the targets with the nearest last part; the module is often wrong or omitted."""
    by_last: dict[str, list[str]] = {}
    for target in (*TARGETS, *REGISTERED):
        by_last.setdefault(target.rpartition(".")[2], []).append(target)
    near = nearest(name.rpartition(".")[2], by_last)
    return [target for last in near for target in by_last[last]][:3]
