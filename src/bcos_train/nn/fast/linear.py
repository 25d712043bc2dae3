"""The B-cos linear layer and the linear layer as autograd functions that use `linear_transform`."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.nn.fast.kernels import (
    Kernels,
    detached_scale,
    reference_backward,
    scale_backward,
    scale_output,
    to_chosen,
    write_counter,
)
from bcos_train.nn.fast.matmul import linear_transform
from bcos_train.nn.fast.maxout import from_blocked, maxout_with_indices, to_blocked
from bcos_train.nn.functional import bcos_transform, feature_norm, maxout

__all__ = ["bcos_linear", "detached_bcos_linear", "linear"]


class _BcosLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, b: float, candidates: int, kernels: Kernels) -> Tensor:
        norm = kernels.feature_norm(x)
        best, choice = _candidates(x, weight, candidates)
        y, saved = scale_output(best, norm, b, kernels)
        out = y.data
        ctx.writes = write_counter(out) if saved is y else None
        ctx.save_for_backward(x, weight, norm, saved, choice)
        ctx.options = (b, candidates, kernels)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm, saved, choice = ctx.saved_tensors
        b, candidates, kernels = ctx.options
        if torch.is_grad_enabled():
            grads = reference_backward(lambda x, w: _reference_linear(x, w, b, candidates), (x, weight), grad)
            return *grads, *[None] * 3
        if ctx.writes is not None and ctx.writes._version:
            saved = scale_output(_candidates(x, weight, candidates)[0], norm, b, kernels)[1]
        best, s = scale_backward(grad, saved, norm, b, -1, kernels)
        large = to_chosen(best, choice, candidates, x.dim() - 1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = linear_transform(large, to_blocked(weight, candidates, 1).T)
            grad_x = kernels.add_product(grad_x, x, s)
        if ctx.needs_input_grad[1]:
            grad_weight = from_blocked(_outer(large, x), candidates, 1)
        return grad_x, grad_weight, None, None, None


class _DetachedBcosLinear(torch.autograd.Function):
    """The B-cos linear layer with a constant scale and weight, which is linear in x. It doesn't save the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, b: float, candidates: int) -> Tensor:
        weight = to_blocked(weight, candidates, 1)
        best, choice = maxout_with_indices(linear_transform(x, weight), candidates, x.dim() - 1)
        scale = detached_scale(best, feature_norm(x), b)
        ctx.save_for_backward(weight, scale, choice)
        ctx.candidates = candidates
        return best.mul_(scale).data  # a view can't be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, choice = ctx.saved_tensors
        large = to_chosen(grad * scale, choice, ctx.candidates, grad.dim() - 1)
        # With a graph this may be differentiated again, which `linear_transform` can't.
        grad_x = large @ weight if torch.is_grad_enabled() else linear_transform(large, weight.T)
        return grad_x, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear_transform(x, weight).data  # a view can't be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return tuple(reference_backward(F.linear, (x, weight), grad))
        grad_x = linear_transform(grad, weight.T) if ctx.needs_input_grad[0] else None
        return grad_x, _outer(grad, x) if ctx.needs_input_grad[1] else None


def _candidates(x: Tensor, weight: Tensor, candidates: int) -> tuple[Tensor, Tensor | None]:
    """Return ŵ·x of the largest candidate, (*, O), and its index; None if there is only one."""
    return maxout_with_indices(linear_transform(x, to_blocked(weight, candidates, 1)), candidates, x.dim() - 1)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a weight: grad xᵀ summed over all leading axes, (*, O), (*, C) -> (O, C)."""
    return linear_transform(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)


def _reference_linear(x: Tensor, weight: Tensor, b: float, candidates: int) -> Tensor:
    out = maxout(F.linear(x, weight), candidates, -1)
    return bcos_transform(out, feature_norm(x), b)


def bcos_linear(x: Tensor, weight: Tensor, b: float, candidates: int, kernels: Kernels) -> Tensor:
    """B-cos linear layer of x, (*, C) -> (*, O), for B > 1; ``weight`` is ŵ, (O * ``candidates``, C)."""
    return _BcosLinear.apply(x, weight, b, candidates, kernels)


def detached_bcos_linear(x: Tensor, weight: Tensor, b: float, candidates: int) -> Tensor:
    """`bcos_linear` in explanation mode with a weight that needs no gradient."""
    return _DetachedBcosLinear.apply(x, weight, b, candidates)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` without a bias."""
    return _Linear.apply(x, weight)
