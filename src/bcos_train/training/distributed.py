"""Small helpers for runs of several processes."""

import torch
import torch.distributed as dist
from torch import nn


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
