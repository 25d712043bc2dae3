"""Batch norm and all-norm, centered and uncentered: batch statistics in training, running statistics in eval mode."""

from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.nn.backend import Accelerated, fast
from bcos_train.nn.detachable import HOLD
from bcos_train.nn.functional import statistics_dtype
from bcos_train.nn.norm.base import Norm2d
from bcos_train.nn.norm.sync import combined_statistics, local_statistics

__all__ = [
    "AllNorm2d",
    "AllNormUncentered2d",
    "BatchNorm2d",
    "BatchNormUncentered2d",
    "RunningNorm2d",
    "sync_batch_norm_",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


class RunningNorm2d(Norm2d):
    """Norm with batch statistics in training mode and running statistics in eval mode.

    Parameters and buffers are those of ``nn.BatchNorm2d``, including ``running_mean``, which uncentered norms don't
    use. It is not a subclass, so that ``nn.SyncBatchNorm.convert_sync_batchnorm`` cannot turn an uncentered norm into
    a centered one; see :func:`sync_batch_norm_`.

    Args:
        num_features: C. The attribute is the number of statistics: 1 for an all-norm, as in the official code.
        eps: Added to the variance.
        momentum: Weight of the newest batch in the running statistics; ``None``: cumulative average.
        affine: Add a weight and a bias.
        track_running_stats: If False, batch statistics are used in eval mode, too.

    The running variance averages the biased batch variance in uncentered norms and the unbiased one in centered norms,
    as ``nn.BatchNorm2d`` does.

    Raises:
        ValueError: The input is not (N, C, H, W), or a centered norm in training has only one value per statistic.
        RuntimeError: A centered norm would use batch statistics in explanation mode.
    """

    dims: tuple[int, ...]  # axes that the statistics are computed over
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    synchronized: bool = False
    process_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.num_features = num_features if len(self.dims) == 3 else 1
        super().__init__(num_features, self.num_features, eps, affine, device, dtype)
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        mean = var = count = None
        if track_running_stats:
            mean = torch.zeros(self.num_features, device=device, dtype=dtype)
            var = torch.ones(self.num_features, device=device, dtype=dtype)
            count = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("num_batches_tracked", count)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if not self.uses_batch_statistics:
            return self._normalize_by_running(x)
        if self.detach and HOLD.get() is Tensor.detach:
            self.check_explanation_mode()
        mean, var, count = self._batch_statistics(x)
        if self.training and self.running_var is not None:
            self.update_running_statistics(mean, var, count)
        return self.normalize(x, mean, var)

    @property
    def uses_batch_statistics(self) -> bool:
        """True in training mode, or without running statistics."""
        return self.training or self.running_var is None

    @property
    def is_synchronized(self) -> bool:
        """True if the batch statistics are currently computed over several processes."""
        return (
            self.synchronized
            and self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )

    def check_explanation_mode(self) -> None:
        if self.centered and self.uses_batch_statistics:
            raise RuntimeError(
                f"{type(self).__name__} would use batch statistics in explanation mode: the output of a sample would "
                "depend on the other samples through the mean. Call model.eval() first, and keep "
                "track_running_stats=True."
            )

    def _normalize_by_running(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        dtype = statistics_dtype(x)
        mean, var = (buffer.to(dtype).view(1, -1, 1, 1) for buffer in (self.running_mean, self.running_var))
        return self.normalize(x, mean, var)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """Return mean, biased variance and the number of values per statistic."""
        if self.is_synchronized:
            return combined_statistics(*local_statistics(x, self.dims), self.process_group)
        mean, var, count = local_statistics(x, self.dims)
        if self.centered and self.training and count < 2:
            raise ValueError(f"{type(self).__name__} in training needs more than one value, got {tuple(x.shape)}.")
        return mean, var, count

    @torch.no_grad()
    def update_running_statistics(self, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
        """Update the running statistics with mean and biased variance, (C,) or (1,), of ``count`` values each."""
        assert self.running_mean is not None
        assert self.running_var is not None
        factor = self._count_batch()
        if self.centered:
            self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), factor)
            fewer = (count - 1).clamp(min=1) if isinstance(count, Tensor) else count - 1
            var = var * (count / fewer)
        self.running_var.lerp_(var.flatten().to(self.running_var.dtype), factor)

    def _count_batch(self) -> float:
        """Increment ``num_batches_tracked`` and return the weight of the batch in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, momentum={self.momentum}, track_running_stats={self.track_running_stats}, "
            f"{super().extra_repr()}" + (", synchronized=True" if self.synchronized else "")
        )


class BatchNorm2d(RunningNorm2d):
    """Batch norm (Ioffe & Szegedy, 2015), statistics over (N, H, W)."""

    centered = True
    dims = (0, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        uses_batch = self.uses_batch_statistics
        if (uses_batch and self.detach) or self.is_synchronized:
            return super().forward(x)
        self.check_input(x)
        updates = self.training and self.running_var is not None
        factor = self._count_batch() if updates else 0.0
        keep = updates or not uses_batch
        return F.batch_norm(
            x,
            self.running_mean if keep else None,
            self.running_var if keep else None,
            self.weight,
            self.bias,
            uses_batch,
            factor,
            self.eps,
        )


class BatchNormUncentered2d(Accelerated, RunningNorm2d):
    """Batch norm without mean subtraction: divides by the standard deviation over (N, H, W)."""

    centered = False
    dims = (0, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = fast.batch_norm_forward(self, x)
        return super().forward(x) if out is None else out


class AllNorm2d(RunningNorm2d):
    """All-norm: statistics over (N, C, H, W), with one mean, variance, weight and bias for all channels."""

    centered = True
    dims = (0, 1, 2, 3)


class AllNormUncentered2d(RunningNorm2d):
    """All-norm without mean subtraction."""

    centered = False
    dims = (0, 1, 2, 3)


def sync_batch_norm_(model: ModelT, process_group: dist.ProcessGroup | None = None) -> ModelT:
    """Synchronize the training statistics of all batch norms and all-norms of this package across processes, in place.

    The counterpart of ``nn.SyncBatchNorm.convert_sync_batchnorm``. Processes may hold batches of different sizes.
    Gradients are those of the sum over the processes' losses. It has no effect without an initialized process group
    of at least two processes.

    Args:
        process_group: ``None``: the default group at the time of the forward pass.

    Returns:
        ``model``.
    """
    for module in model.modules():
        if isinstance(module, RunningNorm2d):
            module.synchronized = True
            module.process_group = process_group
    return model
