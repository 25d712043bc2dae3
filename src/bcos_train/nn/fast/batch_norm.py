"""The fused uncentered batch norm.

Axes: N samples, C channels, H W size.
"""

from typing import Any

import torch
from torch import Tensor

from bcos_train.nn.fast.gpu_batch_norm import gpu_batch_norm, gpu_batch_norm_backward
from bcos_train.nn.fast.gpu_device import is_on_gpu
from bcos_train.nn.fast.kernels import Kernels, reference_backward
from bcos_train.nn.functional import statistics_dtype

__all__ = ["uncentered_batch_norm"]


class _UncenteredBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        if is_native := is_on_gpu(x) and x.numel() > 0:
            out, mean, var, constants = gpu_batch_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, mean, *constants)
        else:
            mean, var = _channel_moments(x)
            inverse = torch.rsqrt(var + eps)
            out = (x * _as_map(inverse if weight is None else inverse * weight)).to(x.dtype)
            ctx.save_for_backward(x, weight, mean, inverse)
        ctx.options = (eps, kernels, is_native)
        ctx.mark_non_differentiable(mean, var)
        # Otherwise autograd would fill two tensors with zeros per call, as gradients of the statistics.
        ctx.set_materialize_grads(False)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight, mean, *constants = ctx.saved_tensors
        eps, kernels, is_native = ctx.options
        if torch.is_grad_enabled():
            inputs = (x,) if weight is None else (x, weight)
            grads = reference_backward(lambda x, *w: _reference_batch_norm(x, w[0] if w else None, eps), inputs, grad)
            return *grads, *[None] * (4 - len(grads))
        if is_native:
            return (
                *gpu_batch_norm_backward(grad, x, weight, mean, tuple(constants), ctx.needs_input_grad[0]),
                None,
                None,
            )
        inverse = constants[0]
        product = _channel_product(grad, x, mean, inverse)
        grad_weight = product * inverse if weight is not None and ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None
        scale = inverse if weight is None else inverse * weight
        # Gradient through the standard deviation, whose derivative with respect to a value is proportional to x - mean.
        slope = scale * inverse.square() * product / (-x.numel() / x.shape[1])
        coefficients = [_as_map(c.to(x.dtype)) for c in (scale, slope, -slope * mean)]
        return kernels.combine(grad, coefficients[0], x, *coefficients[1:]), grad_weight, None, None


def uncentered_batch_norm(
    x: Tensor, weight: Tensor | None, eps: float, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute x / sqrt(var + eps) * weight with the statistics of the batch.

    Returns:
        The output (N, C, H, W), the mean and the biased variance, (C,) each.
    """
    return _UncenteredBatchNorm.apply(x, weight, eps, kernels)


def _reference_batch_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = torch.rsqrt(x.var((0, 2, 3), correction=0) + eps)
    return x * _as_map(scale if weight is None else scale * weight)


def _as_map(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of every channel, (C,)."""
    values = x.to(statistics_dtype(x))
    if x.device.type == "cpu":  # the fastest on CPUs is the kernel of torch's batch norm
        mean, var = torch.batch_norm_update_stats(values, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    return mean, var


def _channel_product(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Return the sum of grad * x of every channel, (C,)."""
    if x.device.type == "cpu":
        values, statistics, mask = (grad.to(mean.dtype), x.to(mean.dtype)), (mean, inverse), (False, True, True)
        grads = torch.ops.aten.native_batch_norm_backward(*values, None, None, None, *statistics, True, 0.0, mask)
        return grads[1] / inverse + mean * grads[2]
    return (grad.to(mean.dtype) * x).sum((0, 2, 3))
