"""Communication between the processes of a run."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bcos_train.config import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    """True if a process group with more than one process is initialized."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def from_rank_zero(trainer: pl.Trainer, compute: Callable[[], T]) -> T:
    """Compute in rank 0 and return the result in all ranks.

    If rank 0 alone raised an error, the others would wait for rank 0 and fail with a traceback.

    Raises:
        UserError: ``compute`` raised a ``ValueError``.
        OSError: ``compute`` raised one.
    """
    result: T | None = None
    problem: UserError | OSError | None = None
    cause: ValueError | None = None
    if trainer.is_global_zero:
        try:
            result = compute()
        except ValueError as error:
            problem, cause = UserError(str(error)), error
        except OSError as error:
            problem = error
    result, problem = trainer.strategy.broadcast((result, problem))
    if problem is not None:
        raise problem from cause
    return cast(T, result)


def broadcast_buffers(module: nn.Module) -> None:
    """Broadcast rank 0's buffers (running statistics) to all processes.

    DDP does so at every forward pass, which hangs if processes have different numbers of batches, as in the validation,
    where no sample is counted twice. Broadcasting once before a validation has the same result.
    """
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def max_over_processes(value: int, device: torch.device) -> int:
    """Return the maximum of the values of all processes."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())


def sum_over_processes(value: int, device: torch.device) -> int:
    """Return the sum of the values of all processes."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor)
    return int(tensor.item())


def means_over_processes(values: Mapping[str, Tensor], device: torch.device) -> dict[str, float]:
    """Return the mean over the processes of each scalar; all processes have the same names, in the same order."""
    if not values or not is_distributed():
        return {name: float(value) for name, value in values.items()}
    row = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
    dist.all_reduce(row)
    return dict(zip(values, (row / dist.get_world_size()).tolist(), strict=True))


def mean_and_votes(value: Tensor, votes: Sequence[bool]) -> tuple[float, list[bool]]:
    """Return the mean over the processes, and for each vote whether it is True in any process.

    This takes one reduction and one synchronization with the device.

    Args:
        value: Scalar. If it isn't finite in one process, the mean isn't finite in any.
        votes: The same number in each process.
    """
    value = value.detach()
    if not is_distributed():
        return value.item(), list(votes)
    row = value.new_zeros(1 + len(votes))
    row[0] = torch.where(value.isfinite(), value, torch.inf) / dist.get_world_size()
    for i, vote in enumerate(votes, start=1):
        if vote:
            row[i].fill_(1)  # a kernel: copying a Python list to the device would synchronize
    dist.all_reduce(row)
    mean, *sums = row.tolist()
    return mean, [count > 0 for count in sums]
