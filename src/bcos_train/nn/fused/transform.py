"""What the B-cos convolution and the B-cos linear layer do with ŵ·x, and what both do about dtypes."""

from collections.abc import Callable

import torch
from torch import Tensor

from bcos_train.nn.autocast import autocast_dtype, autocast_type
from bcos_train.nn.candidates import scatter_to_chosen
from bcos_train.nn.functional import COSINE_EPS
from bcos_train.nn.kernels import Kernels

__all__ = ["detached_scale", "scale_backward", "scale_output", "to_chosen", "uncast"]


def scale_output(out: Tensor, norm: Tensor, b: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """The output, and what the derivative needs of it."""
    if _output_tells(out, b):
        y = kernels.square(out, norm)
        return y, y
    return kernels.square(out.clone(), norm) if b == 2 else kernels.power(out, norm, b), out


def _output_tells(x: Tensor, b: float) -> bool:
    """Whether |ŵ·x| follows from the output: with B = 2, but in float16, where small outputs underflow."""
    return b == 2 and x.dtype != torch.float16


def scale_backward(
    grad: Tensor, kept: Tensor, norm: Tensor, b: float, dim: int | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    if _output_tells(kept, b):
        return kernels.square_backward(grad, kept, norm, dim)
    return kernels.power_backward(grad, kept, norm, b, dim)


def detached_scale(best: Tensor, norm: Tensor, b: float) -> Tensor:
    scale = best.abs().div_(norm)
    return scale if b == 2 else scale.add_(COSINE_EPS).pow_(b - 1)


def to_chosen(grad: Tensor, choice: Tensor | None, candidates: int, dim: int) -> Tensor:
    """The gradient of all candidates; it can be differentiated again."""
    if choice is None:
        return grad
    if torch.is_grad_enabled():
        return torch.cat([grad.where(choice == index, 0) for index in range(candidates)], dim)
    return scatter_to_chosen(grad, choice, candidates, dim)


def uncast(x: Tensor, unit: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`apply` to both in the dtype that autocast wants, if it is on, with autocast off."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return apply(x, unit)
    kind = autocast_type(x)
    # Not the context manager, which takes ten times as long to enter: some hundred layers do.
    torch.set_autocast_enabled(kind, False)
    try:
        return apply(x.to(dtype), unit.to(dtype))
    finally:
        torch.set_autocast_enabled(kind, True)
