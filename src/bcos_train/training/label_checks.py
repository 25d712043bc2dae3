"""Check before the training that the parts of a config are possible with the labels of the data set."""

from bcos_train.config import UserError
from bcos_train.loss import CrossEntropy
from bcos_train.training.config import CommonConfig, TrainConfig

__all__ = ["check_labels"]


def check_labels(settings: CommonConfig) -> None:
    """Check before the training that losses, teacher and mixing are possible with the data set's labels and boxes.

    Raises:
        UserError: They aren't.
    """
    dataset, augmentation = settings.dataset, settings.augmentation
    is_multi_label = bool(getattr(dataset, "is_multi_label", False))
    for key, loss in (("loss", getattr(settings, "loss", None)), ("eval_loss", settings.eval_loss)):
        if is_multi_label and isinstance(loss, CrossEntropy):
            raise UserError(
                f"{key}: cross-entropy is for one label per image, {dataset.name} has several: loss=bce or "
                "loss=uniform_off_label_bce"
            )
    if isinstance(settings, TrainConfig) and settings.distillation is not None and is_multi_label:
        raise UserError(
            f"distillation: a teacher is for one label per image, {dataset.name} has several: distillation=none"
        )
    if isinstance(settings, TrainConfig) and (is_multi_label or getattr(dataset, "has_boxes", False)):
        for key in ("mixup_alpha", "cutmix_alpha"):
            if (alpha := getattr(augmentation, key)) > 0:
                reason = "several labels per image" if is_multi_label else "boxes"
                raise UserError(
                    f"augmentation.{key}={alpha}: {dataset.name} has {reason}, which mixed images can't have: "
                    f"augmentation.{key}=0"
                )
