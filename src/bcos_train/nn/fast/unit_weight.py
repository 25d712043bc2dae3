"""Weight normalization with a hand-written derivative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bcos_train.nn.fast.gpu_device import uses_triton
from bcos_train.nn.fast.gpu_ops import OPS
from bcos_train.nn.fast.kernels import inner_products
from bcos_train.nn.functional import normalize_weight, statistics_dtype

__all__ = ["normalize", "normalize_on_gpu", "reference_backward"]


def normalize(weight: Tensor) -> Tensor:
    """ŵ = w / ‖w‖ for every output unit (the first axis), as `normalize_weight`."""
    return _Normalize.apply(weight)


def normalize_on_gpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """As `normalize`, in ``dtype`` where Triton can be used."""
    if uses_triton(weight) and weight.numel() > 0 and _is_dense(weight):
        return _NormalizeOnGPU.apply(weight, dtype)
    return _Normalize.apply(weight)


class _Normalize(torch.autograd.Function):
    """Its derivative is the projection onto the complement of ŵ, divided by ‖w‖."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(_rows(weight, weight), dim=1, dtype=statistics_dtype(weight))
        unit = (weight / norm.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        ctx.save_for_backward(weight, unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        weight, unit, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            return reference_backward(normalize_weight, (weight,), grad)[0]
        shape = (-1, *[1] * (weight.dim() - 1))
        along = inner_products(_rows(grad, unit), _rows(unit, unit), norm.dtype)
        return torch.addcmul(grad, unit, -along.view(shape).to(grad.dtype)).div_(norm.view(shape))


class _NormalizeOnGPU(torch.autograd.Function):
    """The same in two launches: the eager operations take nine, and the casts of autocast two more."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        unit, norm = OPS.normalize.default(weight, dtype)
        ctx.save_for_backward(weight, norm)
        ctx.dtype = dtype
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        weight, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            return reference_backward(lambda weight: normalize_weight(weight).to(ctx.dtype), (weight,), grad)[0], None
        if grad.stride() != weight.stride():
            grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
        return OPS.normalize_backward.default(grad, weight, norm), None


def _is_dense(weight: Tensor) -> bool:
    """True if the values of each output unit are adjacent in memory."""
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """(O, ...) -> (O, the rest), in the memory order of ``weight``: a view of that one."""
    if weight.dim() == 4 and not weight.is_contiguous():
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def reference_backward(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of the inputs through the definition, with a graph: for derivatives of derivatives."""
    needed = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(function(*inputs), needed, grad, create_graph=True))
    return [next(grads) if x.requires_grad else None for x in inputs]
