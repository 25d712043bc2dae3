"""The seam between the training loop and what a step optimizes.

The loop encodes a batch, mixes it if asked to, lets the task turn network and batch into a loss, and does everything
else: finite check, backward pass, clipping, optimizer, logs. A new training objective (distillation, guidance) is a
new task and needs no change in the loop.
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
        loss: Scalar with a graph; what the step minimizes.
        logits: (N, K) of the trained network, for accuracy.
        logs: Further scalars, without a graph, logged as ``train/<name>``; they stay on the device until they are
            logged.
    """

    loss: Tensor
    logits: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)


class Task(nn.Module):
    """What a training step optimizes.

    A submodule of the LightningModule, so that it follows it to the device. Weights that are not trained, such as a
    teacher's, must stay out of the module tree: they would enter optimizer, DDP and checkpoints.
    """

    @abstractmethod
    def forward(self, network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, batch: Batch) -> TaskOutput:
        """Compute the loss of a batch.

        Args:
            network: (N, C, H, W) -> logits (N, K); the trained network, compiled if the run compiles it.
            x: (N, C, H, W), the encoded and possibly mixed images.
            target: (N,) labels, or (N, K) probabilities of mixed images.
            batch: The batch as it was loaded.
        """
