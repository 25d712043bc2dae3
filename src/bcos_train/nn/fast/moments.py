"""Mean and variance, with less memory than `torch.var_mean` and faster on CPUs."""

from typing import Any

import torch
from torch import Tensor

from bcos_train.nn.functional import statistics_dtype

__all__ = ["moments"]


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over ``dims``, kept as axes of size 1; in float32 or float64."""
    return _Moments.apply(x, dims)


class _Moments(torch.autograd.Function):
    """`torch.var_mean` that saves the input itself for the backward pass, not a float32 copy of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        var, mean = _var_mean(x.to(statistics_dtype(x)), dims)
        return mean, var

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, tuple[int, ...]], output: tuple[Tensor, Tensor]) -> None:
        x, _ = inputs
        ctx.save_for_backward(x, output[0])
        ctx.count = x.numel() // output[0].numel()
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> tuple[Tensor | None, None]:
        x, mean = ctx.saved_tensors
        grad = None
        if grad_var is not None:
            grad = (x - mean) * (grad_var * (2 / ctx.count))
        if grad_mean is not None:
            shift = grad_mean / ctx.count
            grad = shift.expand(x.shape) if grad is None else grad + shift
        return None if grad is None else grad.to(x.dtype), None


def _var_mean(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if x.device.type == "cpu":  # `var_mean` isn't vectorized on the CPU: more than ten times slower
        mean = x.mean(dims, keepdim=True)
        return (x - mean).square().mean(dims, keepdim=True), mean
    return torch.var_mean(x, dims, correction=0, keepdim=True)
