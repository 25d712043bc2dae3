"""Tasks: objectives of a training step."""

from bcos_train.task.base import Network, Task, TaskOutput, TrainingBatch
from bcos_train.task.classification import Classification
from bcos_train.task.distillation import Distillation, DistillationTask, FrozenDistillation
from bcos_train.task.guidance import Guidance

__all__ = [
    "Classification",
    "Distillation",
    "DistillationTask",
    "FrozenDistillation",
    "Guidance",
    "Network",
    "Task",
    "TaskOutput",
    "TrainingBatch",
]
