"""Small helpers for runs of several processes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether a process group with more than one process is running."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def broadcast_buffers(module: nn.Module) -> None:
    """Give all processes rank 0's buffers (running statistics).

    DDP does so at every forward pass, which hangs where processes hold different numbers of batches, as an exactly
    counted validation set makes them. It is done once before a validation instead, with the same result.
    """
    if is_distributed():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def largest(value: int, device: torch.device) -> int:
    """The largest of the processes' values."""
    if not is_distributed():
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor.item())


def mean_and_votes(value: Tensor, votes: Sequence[bool]) -> tuple[float, list[bool]]:
    """The mean over the processes, and for each vote whether any of them casts it.

    All of it takes one reduction and one read of the device, for which this process waits.

    Args:
        value: Scalar. If it isn't finite in one process, the mean isn't finite in any.
        votes: As many in each process.
    """
    value = value.detach()
    if not is_distributed():
        return value.item(), list(votes)
    row = value.new_zeros(1 + len(votes))
    row[0] = torch.where(value.isfinite(), value, torch.inf) / dist.get_world_size()
    for i, vote in enumerate(votes, start=1):
        if vote:
            row[i].fill_(1)  # by a kernel: copying a Python list to the device would wait for it
    dist.all_reduce(row)
    mean, *sums = row.tolist()
    return mean, [number > 0 for number in sums]
