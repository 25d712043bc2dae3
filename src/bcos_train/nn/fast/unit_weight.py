"""Weight normalization with a hand-written derivative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bcos_train.nn.fast.workspace import inner_products
from bcos_train.nn.functional import normalize_weight, statistics_dtype

__all__ = ["normalize", "reference_backward"]


def normalize(weight: Tensor) -> Tensor:
    """ŵ = w / ‖w‖ for every output unit (the first axis), as `normalize_weight`."""
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
