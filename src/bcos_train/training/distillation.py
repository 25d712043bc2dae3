"""The objective of a run with a teacher."""

from collections.abc import Sequence

from torch import nn

from bcos_train.config import user_errors_at
from bcos_train.dataset.classes import check_same_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.distillation import DistillationOptions, Teacher, load_teacher
from bcos_train.task import Distillation, DistillationTask
from bcos_train.training.config import TrainConfig
from bcos_train.training.frozen import build_frozen_distillation

__all__ = ["build_distillation", "load_checked_teacher"]


def build_distillation(
    settings: TrainConfig, options: DistillationOptions, model: nn.Module, data: DataModule, num_classes: int
) -> DistillationTask:
    """Load the teacher, or open its stored maps, and build the objective.

    Args:
        num_classes: K of the model.

    Raises:
        UserError: The teacher can't be loaded, has other classes, or its maps don't fit the run.
    """
    if options.frozen is not None:
        return build_frozen_distillation(settings, options, model, data, num_classes)
    teacher = load_checked_teacher(options, data.class_names, num_classes)
    with user_errors_at("distillation"):
        return Distillation(settings.loss, teacher, options, model)


def load_checked_teacher(options: DistillationOptions, class_names: Sequence[str], num_classes: int) -> Teacher:
    """Load the teacher and compare its classes with those of the data set.

    Args:
        class_names: Those of the data set.
        num_classes: K of the model.

    Raises:
        UserError: The teacher can't be loaded or has other classes.
    """
    with user_errors_at("distillation"):
        teacher = load_teacher(options, num_classes)
        if teacher.class_names is not None:
            check_same_classes(class_names, teacher.class_names, teacher.label, "use a teacher of these classes")
        return teacher
