"""Interface between the training loop and the objective of a training step.

The loop mixes and encodes a batch, calls the task for the loss, and does everything else: finite check, backward pass,
clipping, optimizer step, logging. A new objective (distillation, guidance) is a new task; the loop stays unchanged.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Network", "Task", "TaskOutput", "TrainingBatch"]


class Network:
    """The trained network: a function ``(N, C, H, W) -> (N, K)``, compiled if the run compiles it.

    Attributes:
        model: The module itself, uncompiled, for a task that explains it or uses its features.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


class TrainingBatch(NamedTuple):
    """A batch on the device, as the network sees it.

    Attributes:
        x: ``(N, C, H, W)`` float, the network's input: ``rgb``, encoded.
        target: ``(N,)`` labels, or ``(N, K)`` label distributions of mixed images.
        rgb: ``(N, 3, H, W)`` float in [0, 1], augmented and possibly mixed images.
        indices: ``(N,)`` int64, indices of the samples in the training set.
        extras: Further data of the data set by name, such as boxes.
        epoch: Number of epochs before this one.
        step: Number of optimizer steps before this one in the epoch.
    """

    x: Tensor
    target: Tensor
    rgb: Tensor
    indices: Tensor
    extras: Mapping[str, object] | None = None
    epoch: int = 0
    step: int = 0


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
    def forward(self, network: Network, batch: TrainingBatch) -> TaskOutput:
        """Compute the loss of a batch.

        Args:
            network: The trained network in training mode.
            batch: Its input and what belongs to it.

        Returns:
            The loss, and the logits of ``batch.x``, which count towards the training accuracy.
        """
