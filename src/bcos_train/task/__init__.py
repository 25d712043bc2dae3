"""Tasks: objectives of a training step."""

from bcos_train.task.base import Network, Task, TaskOutput, TrainingBatch
from bcos_train.task.classification import Classification

__all__ = ["Classification", "Network", "Task", "TaskOutput", "TrainingBatch"]
