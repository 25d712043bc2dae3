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
    """Objective of a training step: a module whose ``forward`` computes the loss of a batch.

    A task provides nothing else. The training loop takes care of the following, and relies on what is said here:

    * **Device and state.** A task is a submodule of the LightningModule and moves to the device with it. The optimizer
      and checkpoints cover only the trained network: parameters and buffers of a task are neither trained nor saved.
      Keep weights such as those of a teacher out of its submodules, since DDP would synchronize them.
    * **One call per batch and process.** With accumulation, several batches make up an optimizer step. The batch is a
      process's share of the global batch, and the processes' gradients are averaged, so the loss is a mean over the
      images and not a sum.
    * **Randomness.** The generators are seeded for each batch; a task that draws from them stays reproducible and can
      be resumed. It keeps no state between batches for the same reason.
    * **Other processes.** A task does not communicate. The loss is averaged over the processes right after the call,
      in a reduction that also carries the requests to save or stop (``Classifier.votes``). If it is not finite in any
      process, all of them raise :class:`~bcos_train.training.module.NonFiniteLoss` before the backward pass.
    * **No waiting for the device.** That reduction is the step's only synchronization: no ``item()``, ``tolist()`` or
      branch on a tensor's value in a task.
    """

    @abstractmethod
    def forward(self, network: Callable[[Tensor], Tensor], x: Tensor, target: Tensor, batch: Batch) -> TaskOutput:
        """Compute the loss of a batch.

        Args:
            network: ``(N, C, H, W) -> (N, K)``, the trained network in training mode, compiled if the run compiles it.
                Other members of the model are not available through it.
            x: ``(N, C, H, W)`` float, encoded and possibly mixed images.
            target: ``(N,)`` labels, or ``(N, K)`` label distributions of mixed images.
            batch: The batch as it was loaded: unmixed uint8 images, labels, indices in the training set.

        Returns:
            The loss, and the logits of ``x``, which count towards the training accuracy.
        """
