"""Classification by a loss on the logits."""

from collections.abc import Callable

from torch import Tensor, nn

from bcos_train.dataset.batch import Batch
from bcos_train.task.base import Task, TaskOutput

__all__ = ["Classification"]


class Classification(Task):
    """Minimize ``loss(logits, target)``.

    Args:
        loss: ``(logits (N, K), target) -> scalar``.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, batch: Batch) -> TaskOutput:
        logits = network(x)
        return TaskOutput(self.loss(logits, target), logits)
