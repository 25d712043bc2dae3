"""The uncentered batch norm by torch's native CUDA kernels, each of which reads an activation once.

They take bfloat16 and float16 in either memory format and compute in float32; eager operations would write float32
copies. ResNet-50's batch norms read and write 8 activations instead of 28.

Axes: N samples, C channels, H W size.
"""

import torch
from torch import Tensor

from bcos_train.nn.fast.gpu_device import uses_triton
from bcos_train.nn.fast.gpu_ops import OPS
from bcos_train.nn.fast.kernels import memory_format

__all__ = ["gpu_batch_norm", "gpu_batch_norm_backward"]

Constants = tuple[Tensor, Tensor, Tensor]


def gpu_batch_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Constants]:
    """Compute x / sqrt(var + eps) * weight with the statistics of the batch.

    Args:
        x: (N, C, H, W), on a GPU, not empty.
        weight: (C,) or None.

    Returns:
        The output (N, C, H, W); mean and biased variance, (C,) each; and the constants for the derivative.
    """
    x = _dense(x)
    mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
    inverse, zeros, _ = constants = _constants(var, eps, x.numel() // x.shape[1])
    out = torch.batch_norm_elemt(x, _wide(weight, mean), None, zeros, inverse, eps)
    return out, mean, var, constants


def gpu_batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, constants: Constants, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x (None unless ``needs_x``) and of the weight (if it is not None).

    The native kernels compute the gradient of the centered norm,
    (grad - sum(grad) / n - (x - mean) inverse² sum(grad (x - mean)) / n) inverse weight.
    Given 0 for sum(grad), and sum(grad x) for sum(grad (x - mean)), they compute the gradient of the uncentered one.
    """
    x = _dense(x)
    # The kernels assume that both tensors have the memory format of one of them.
    grad = grad.contiguous(memory_format=memory_format(x))
    wide = _wide(weight, mean)
    inverse, zeros, count = constants
    sums = torch.batch_norm_backward_reduce(grad, x, zeros, inverse, wide, True, weight is not None, False)
    sum_grad_x, grad_weight = sums[1:3]
    grad_x = None
    if needs_x:
        grad_x = torch.batch_norm_backward_elemt(grad, x, mean, inverse, wide, zeros, sum_grad_x, count)
    return grad_x, None if weight is None else grad_weight.to(weight.dtype)


def _constants(var: Tensor, eps: float, count: int) -> Constants:
    """Return 1 / sqrt(var + eps), zeros to pass for a mean or sum, and the number of values of a channel."""
    if uses_triton(var):
        inverse, zeros, counts = OPS.batch_norm_constants.default(var, eps, count)
        return inverse, zeros, counts
    counts = torch.full((1,), count, dtype=torch.int32, device=var.device)
    return torch.rsqrt(var + eps), torch.zeros_like(var), counts


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=memory_format(x))


def _wide(weight: Tensor | None, mean: Tensor) -> Tensor | None:
    """Convert the weight to the dtype of the statistics, which some of the kernels require."""
    return None if weight is None else weight.to(mean.dtype)
