"""Classification by a loss on the logits."""

from torch import nn

from bcos_train.task.base import Network, Task, TaskOutput, TrainingBatch

__all__ = ["Classification"]


class Classification(Task):
    """Minimize ``loss(logits, target)``.

    Args:
        loss: ``(logits (N, K), target) -> scalar``.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, network: Network, batch: TrainingBatch) -> TaskOutput:
        logits = network(batch.x)
        return TaskOutput(self.loss(logits, batch.target), logits)
