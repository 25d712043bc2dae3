"""Interface between the training loop and the objective of a training step.

The loop mixes and encodes a batch, calls the task for the loss, and does everything else: finite check, backward pass,
clipping, optimizer step, logging. A new objective (distillation, guidance) is a new task; the loop stays unchanged.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from bcos_train.dataset.batch import Batch

__all__ = ["Task", "TaskOutput"]


@dataclass(frozen=True)
class TaskOutput:
    """Result of a task for one batch.

    Attributes:
        loss: Scalar to minimize, attached to the graph.
        logits: ``(N, K)`` of the trained network, for accuracy.
        logs: Further scalars, detached, logged as ``train/<name>``; they stay on the device until they are logged.
    """

    loss: Tensor
    logits: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Task(nn.Module):
    """Objective of a training step.

    A task is a submodule of the LightningModule and moves to the device with it. Weights that are not trained, such as
    those of a teacher, must not be submodules: they would be passed to the optimizer, DDP and checkpoints.
    """

    @abstractmethod
    def forward(self, network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, batch: Batch) -> TaskOutput:
        """Compute the loss of a batch.

        Args:
            network: ``(N, C, H, W) -> (N, K)``, the trained network, compiled if the run compiles it.
            x: ``(N, C, H, W)``, encoded and possibly mixed images.
            target: ``(N,)`` labels, or ``(N, K)`` label distributions of mixed images.
            batch: The batch as it was loaded.
        """
