"""The objective of a run with a teacher."""

from collections.abc import Sequence

from torch import nn

from bcos_train.config import user_errors_at
from bcos_train.dataset.classes import check_same_classes
from bcos_train.distillation import DistillationOptions, load_teacher
from bcos_train.task import Distillation
from bcos_train.training.config import TrainConfig

__all__ = ["build_distillation"]


def build_distillation(
    settings: TrainConfig, options: DistillationOptions, model: nn.Module, class_names: Sequence[str], num_classes: int
) -> Distillation:
    """Load the teacher and build the objective.

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
        return Distillation(settings.loss, teacher, options, model)
