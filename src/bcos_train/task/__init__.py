"""Tasks: objectives of a training step."""

from bcos_train.task.base import Task, TaskOutput
from bcos_train.task.classification import Classification

__all__ = ["Classification", "Task", "TaskOutput"]
