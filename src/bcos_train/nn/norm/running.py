"""Batch norm and all-norm, centred and uncentred: norms with statistics over the batch, and running ones for eval."""

from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.nn.backend import Fusable
from bcos_train.nn.functional import statistics_dtype
from bcos_train.nn.fused import uncentred_batch_norm
from bcos_train.nn.norm.base import Norm2d, normalise
from bcos_train.nn.norm.sync import combined_statistics, local_statistics
from bcos_train.nn.observers import is_plain
from bcos_train.nn.unit_weight import FROZEN

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
    """A norm that takes its statistics from the batch in training, and from running averages in eval mode.

    Parameters and buffers are those of `nn.BatchNorm2d`, also where `running_mean` is of no use. Not a subclass of
    it, so that `nn.SyncBatchNorm.convert_sync_batchnorm` cannot turn an uncentred norm into a centred one: see
    `sync_batch_norm_`.

    Args:
        num_features: C. (The attribute is the number of statistics: 1 for an all-norm, as in the official code.)
        eps: added to the variance.
        momentum: the share of the newest batch in the running statistics; None averages over all batches.
        affine: whether there are a weight and a bias.
        track_running_stats: False uses the statistics of the batch in eval mode too.

    The running variance follows the biased batch variance in uncentred norms, the unbiased one in centred norms (as
    `nn.BatchNorm2d`).

    Raises:
        ValueError: the input is not 4-dimensional; a centred norm in training gets one value to average over.
        RuntimeError: a centred norm is to use the statistics of the batch in explanation mode.
    """

    dims: tuple[int, ...]  # the statistics are taken over these axes
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    synchronised: bool = False
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

    def set_explanation_mode(self, activate: bool = True) -> None:
        if activate and self._uses_batch():
            self._refuse_batch_statistics()
        super().set_explanation_mode(activate)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if not self._uses_batch():
            return self._normalise_by_running(x)
        if self.detach:
            self._refuse_batch_statistics()
        mean, var, count = self._batch_statistics(x)
        if self.training and self.running_var is not None:
            self._update_running(mean, var, count)
        return normalise(x, mean if self.centred else None, var, self.weight, self.bias, self.eps)

    def _uses_batch(self) -> bool:
        return self.training or self.running_var is None

    def _is_synchronised(self) -> bool:
        return (
            self.synchronised
            and self.training
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size(self.process_group) > 1
        )

    def _refuse_batch_statistics(self) -> None:
        if self.centred:
            raise RuntimeError(
                f"{type(self).__name__} in explanation mode with the statistics of the batch: the output of a sample "
                "would depend on the other samples through the mean. Call model.eval() first, and keep "
                "track_running_stats=True."
            )

    def _normalise_by_running(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        dtype = statistics_dtype(x)
        mean = self.running_mean.to(dtype).view(1, -1, 1, 1) if self.centred else None
        var = self.running_var.to(dtype).view(1, -1, 1, 1)
        return normalise(x, mean, var, self.weight, self.bias, self.eps)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """Mean, biased variance, and the number of values that they are of."""
        values = x.detach() if self.detach else x
        if self._is_synchronised():
            return combined_statistics(*local_statistics(values, self.dims), self.process_group)
        mean, var, count = local_statistics(values, self.dims)
        if self.centred and self.training and count < 2:
            raise ValueError(f"{type(self).__name__} in training needs more than one value, got {tuple(x.shape)}.")
        return mean, var, count

    @torch.no_grad()
    def _update_running(self, mean: Tensor, var: Tensor, count: Tensor | int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        factor = self._count_batch()
        if self.centred:
            self.running_mean.lerp_(mean.flatten().to(self.running_mean.dtype), factor)
            fewer = (count - 1).clamp(min=1) if isinstance(count, Tensor) else count - 1
            var = var * (count / fewer)
        self.running_var.lerp_(var.flatten().to(self.running_var.dtype), factor)

    def _count_batch(self) -> float:
        """Count one batch more; the share that it has in the running statistics."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, momentum={self.momentum}, track_running_stats={self.track_running_stats}, "
            f"{super().extra_repr()}" + (", synchronised=True" if self.synchronised else "")
        )


class BatchNorm2d(RunningNorm2d):
    """Batch norm (Ioffe & Szegedy, 2015), statistics over (N, H, W)."""

    centred = True
    dims = (0, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        uses_batch = self._uses_batch()
        if (uses_batch and self.detach) or self._is_synchronised():
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


class BatchNormUncentered2d(Fusable, RunningNorm2d):
    """Batch norm that divides by the standard deviation over (N, H, W) and subtracts nothing."""

    centred = False
    dims = (0, 2, 3)

    @property
    def is_folded(self) -> bool:
        """Whether the layer before has taken the scaling over; see `frozen_weights`."""
        return not is_plain() and self in FROZEN.norms

    def is_scaling(self) -> bool:
        """Whether it multiplies each channel by a constant."""
        return self.bias is None and not self._uses_batch()

    def inference_scale(self) -> Tensor:
        """That constant, (C,), in float32 or float64."""
        assert self.running_var is not None
        scale = torch.rsqrt(self.running_var.to(statistics_dtype(self.running_var)) + self.eps)
        return scale if self.weight is None else scale * self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.is_folded:
            if self._uses_batch():
                raise RuntimeError(f"{type(self).__name__} can't be put into training mode within frozen_weights().")
            return x
        kernels = self.fused_kernels(x)
        if kernels is None or self.detach or self.bias is not None or not self._uses_batch() or self._is_synchronised():
            return super().forward(x)
        self.check_input(x)
        out, mean, var = uncentred_batch_norm(x, self.weight, self.eps, kernels)
        if self.training and self.running_var is not None:
            self._update_running(mean, var, x.numel() // self.num_features)
        return out


class AllNorm2d(RunningNorm2d):
    """Statistics over the whole batch, (N, C, H, W): one mean, variance, weight and bias for all channels."""

    centred = True
    dims = (0, 1, 2, 3)


class AllNormUncentered2d(RunningNorm2d):
    """`AllNorm2d` that subtracts nothing."""

    centred = False
    dims = (0, 1, 2, 3)


def sync_batch_norm_(model: ModelT, process_group: dist.ProcessGroup | None = None) -> ModelT:
    """Let every batch norm and all-norm of this package in `model` take its training statistics over all processes.

    The counterpart of `nn.SyncBatchNorm.convert_sync_batchnorm`, in place. Processes may hold batches of different
    sizes. Gradients are those of the sum over the processes' losses. Without an initialised process group, or with
    one process in it, nothing changes.

    Args:
        process_group: None stands for the default group at the time of the forward pass.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if isinstance(module, RunningNorm2d):
            module.synchronised = True
            module.process_group = process_group
    return model
