"""Batch statistics over all processes.

Axes: R processes, S statistics (one per channel, or a single one).
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from bcos_train.nn.backend import fast
from bcos_train.nn.functional import statistics_dtype

__all__ = ["combined_statistics", "local_statistics"]


def local_statistics(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Return mean and biased variance over ``dims`` (kept as axes of size 1), and the number of values of each.

    For an empty batch both are 0, but part of the autograd graph of ``x``, so that this process takes part in the
    collectives of the backward pass.
    """
    if x.numel() == 0:
        zero = x.sum(dims, keepdim=True, dtype=statistics_dtype(x))
        return zero, zero, 0
    mean, var = fast.moments(x, dims)
    return mean, var, x.numel() // mean.numel()


def combined_statistics(
    mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the mean, biased variance and count of each process into those of the whole batch.

    A differentiable all-reduce, in which every process fills its own row, gathers the moments; they are then combined
    about the common mean (Chan et al., 1979). Summing squares and subtracting the squared mean would need no rows, but
    loses precision in float32.
    """
    shape, size = mean.shape, mean.numel()
    # No value is copied from the host to the GPU, since this would wait for all queued work.
    row = torch.cat([mean.flatten(), var.flatten(), mean.new_full((1,), count)])
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    rows = F.pad(row[None], (0, 0, rank, world_size - 1 - rank))
    rows = all_reduce(rows, group=dist.group.WORLD if group is None else group)
    means_RS, vars_RS, counts_R1 = rows.split([size, size, 1], dim=1)
    total = counts_R1.sum()
    share_R1 = counts_R1 / total
    mean_S = (share_R1 * means_RS).sum(0)
    var_S = (share_R1 * (vars_RS + (means_RS - mean_S).square())).sum(0)
    return mean_S.view(shape), var_S.view(shape), total
