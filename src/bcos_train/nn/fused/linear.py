"""The fused B-cos linear layer, and the plain one; their products are those of :mod:`bcos_train.nn.product`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.nn.candidates import arrange, choose, restore
from bcos_train.nn.functional import bcos_scale, feature_norm, max_out
from bcos_train.nn.fused.transform import detached_scale, scale_backward, scale_output, to_chosen, uncast
from bcos_train.nn.kernels import Kernels
from bcos_train.nn.product import product
from bcos_train.nn.unit_weight import plain_backward

__all__ = ["bcos_linear", "detached_bcos_linear", "linear"]


class _BcosLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, b: float, candidates: int, kernels: Kernels) -> Tensor:
        norm = kernels.feature_norm(x)
        best, choice = choose(product(x, arrange(weight, candidates, 1)), candidates, x.dim() - 1)
        y, kept = scale_output(best, norm, b, kernels)
        ctx.save_for_backward(x, weight, norm, kept, choice)
        ctx.options = (b, candidates, kernels)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm, kept, choice = ctx.saved_tensors
        b, candidates, kernels = ctx.options
        if torch.is_grad_enabled():
            grads = plain_backward(lambda x, w: _plain_linear(x, w, b, candidates), (x, weight), grad)
            return *grads, *[None] * 3
        best, s = scale_backward(grad, kept, norm, b, -1, kernels)
        large = to_chosen(best, choice, candidates, x.dim() - 1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(large, arrange(weight, candidates, 1).T)
            grad_x = kernels.add_product(grad_x, x, s)
        if ctx.needs_input_grad[1]:
            grad_weight = restore(_outer(large, x), candidates, 1)
        return grad_x, grad_weight, None, None, None


class _DetachedBcosLinear(torch.autograd.Function):
    """The B-cos linear layer with a constant scale and a constant weight: linear in x. It keeps the scale alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, b: float, candidates: int) -> Tensor:
        weight = arrange(weight, candidates, 1)
        best, choice = choose(product(x, weight), candidates, x.dim() - 1)
        scale = detached_scale(best, feature_norm(x), b)
        ctx.save_for_backward(weight, scale, choice)
        ctx.candidates = candidates
        return best.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, choice = ctx.saved_tensors
        large = to_chosen(grad * scale, choice, ctx.candidates, grad.dim() - 1)
        # This may be differentiated again.
        grad_x = large @ weight if torch.is_grad_enabled() else product(large, weight.T)
        return grad_x, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(plain_backward(F.linear, (x, weight), grad))
        grad_x = product(grad, weight.T) if ctx.needs_input_grad[0] else None
        return grad_x, _outer(grad, x) if ctx.needs_input_grad[1] else None


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight: the sum over all leading axes of grad xᵀ, (*, O), (*, C) -> (O, C)."""
    return product(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)


def _plain_linear(x: Tensor, weight: Tensor, b: float, candidates: int) -> Tensor:
    out = max_out(F.linear(x, weight), candidates, -1)
    return (out * bcos_scale(out, feature_norm(x), b)).to(out.dtype)


def bcos_linear(x: Tensor, unit: Tensor, b: float, candidates: int, kernels: Kernels) -> Tensor:
    """The B-cos linear layer of x, (*, C) -> (*, O), for B > 1; ŵ is (O * `candidates`, C)."""
    return uncast(x, unit, lambda x, unit: _BcosLinear.apply(x, unit, b, candidates, kernels))


def detached_bcos_linear(x: Tensor, unit: Tensor, b: float, candidates: int) -> Tensor:
    """:func:`bcos_linear` in explanation mode with a weight that gets no gradient."""
    return uncast(x, unit, lambda x, unit: _DetachedBcosLinear.apply(x, unit, b, candidates))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, with the product of :mod:`bcos_train.nn.product`."""
    return uncast(x, weight, _Linear.apply)
