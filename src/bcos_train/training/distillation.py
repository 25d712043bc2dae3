"""The objective of a run with a teacher."""

from collections.abc import Sequence

from torch import nn

from bcos_train.config import UserError, user_errors_at
from bcos_train.dataset import isolated_rng, to_float
from bcos_train.dataset.classes import check_same_classes
from bcos_train.dataset.data_module import DataModule
from bcos_train.distillation import DistillationOptions, Teacher, explain_by, load_teacher
from bcos_train.explanation import evaluating
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
        task = Distillation(settings.loss, teacher, options, model)
    _try_images(task, settings, model, data)
    return task


def _try_images(task: Distillation, settings: TrainConfig, model: nn.Module, data: DataModule) -> None:
    """Show the networks a training and a validation image, before anything is written.

    Raises:
        UserError: They don't accept images of this size, or can't be explained.
    """
    for kind, images in (("training", data.train_samples([0])[0]), ("validation", data.val_samples([0])[0])):
        rgb = to_float(images)
        try:
            with isolated_rng():
                task.teacher.predict(rgb)
                if task.options.explanation_weight:
                    expected, _ = task.teacher.explain(rgb, task.explanation)
                    with evaluating(model):
                        x = settings.encoding.encode(rgb)
                        explain_by(task.explanation, model, x, expected.argmax(1), create_graph=True)
        # bcos_train's models raise a ValueError, torch's layers a RuntimeError, timm's models an AssertionError.
        except (ValueError, RuntimeError, AssertionError) as error:
            height, width = images.shape[2:]
            problem = f"a {kind} image of {height}x{width} pixels fails: {' '.join(str(error).split())}"
            raise UserError(f"distillation.teacher={task.options.teacher}: {problem}") from error


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
