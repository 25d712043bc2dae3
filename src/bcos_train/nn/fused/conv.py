"""The fused B-cos convolution.

Axes: N samples, C channels, G groups, O output units, U = O / G units of a group, H W input size, P Q output size.
"""

from typing import Any

import torch
from torch import Tensor

from bcos_train.nn.candidates import arrange, choose, restore
from bcos_train.nn.functional import bcos_scale, max_out, patch_norm
from bcos_train.nn.fused.geometry import Convolution
from bcos_train.nn.fused.transform import detached_scale, scale_backward, scale_output, to_chosen, uncast
from bcos_train.nn.kernels import Kernels
from bcos_train.nn.layout import memory_format
from bcos_train.nn.unit_weight import plain_backward

__all__ = ["bcos_conv2d", "detached_bcos_conv2d"]


class _BcosConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int, kernels: Kernels
    ) -> Tensor:
        groups = _viewed_groups(conv, len(weight))
        norm = kernels.patch_norm(x, conv)
        out = conv(x, arrange(weight, candidates, groups))
        best, choice = choose(_grouped(out, groups), candidates, _unit_dim(groups))
        y, kept = scale_output(best, _grouped(norm, groups), b, kernels)
        ctx.save_for_backward(x, weight, norm, kept, choice)
        ctx.options = (conv, b, candidates, kernels)
        return _ungrouped(y, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm, kept, choice = ctx.saved_tensors
        conv, b, candidates, kernels = ctx.options
        if torch.is_grad_enabled():
            grads = plain_backward(lambda x, w: _plain_conv2d(x, w, conv, b, candidates), (x, weight), grad)
            return *grads, *[None] * 4
        groups = _viewed_groups(conv, len(weight))
        dim = _unit_dim(groups)
        norm = _grouped(norm, groups)
        # With a single unit in each group there is nothing to sum over.
        summed = None if len(weight) == conv.groups else dim
        best, s = scale_backward(_grouped(grad, groups), kept, norm, b, summed, kernels)
        large = _ungrouped(to_chosen(best, choice, candidates, dim), groups)
        grad_x, grad_weight = conv.backward(large, x, arrange(weight, candidates, groups), ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            s = conv.box_adjoint(_small(s, groups), x.shape[2:])
            inputs = _viewed_groups(conv, x.shape[1])
            total = kernels.add_product(_grouped(grad_x, inputs), _grouped(x, inputs), _grouped(s, inputs))
            grad_x = _ungrouped(total, inputs)
        if ctx.needs_input_grad[1]:
            grad_weight = restore(grad_weight, candidates, groups)
        return grad_x, grad_weight, None, None, None, None


class _DetachedBcosConv2d(torch.autograd.Function):
    """The B-cos convolution with a constant scale and a constant weight: linear in x. It keeps the scale alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
        groups = _viewed_groups(conv, len(weight))
        weight = arrange(weight, candidates, groups)
        best, choice = choose(_grouped(conv(x, weight), groups), candidates, _unit_dim(groups))
        scale = detached_scale(best, _grouped(conv.norm(x), groups), b)
        ctx.save_for_backward(weight, scale, choice)
        ctx.options = (conv, candidates, x.shape, memory_format(x))
        return _ungrouped(best.mul_(scale), groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, choice = ctx.saved_tensors
        conv, candidates, shape, layout = ctx.options
        groups = _viewed_groups(conv, len(weight))
        dim = _unit_dim(groups)
        # Plain operations throughout, since this may be differentiated again.
        large = to_chosen(_grouped(grad, groups) * scale, choice, candidates, dim)
        # Only the shape and the layout of the input matter.
        blank = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        grad_x, _ = conv.backward(_ungrouped(large, groups), blank, weight, (True, False))
        return grad_x, None, None, None, None


def _viewed_groups(conv: Convolution, channels: int) -> int:
    """How many groups `_grouped` is to make of them. With a single channel in each, the two are the same axis."""
    return 1 if channels == conv.groups else conv.groups


def _unit_dim(groups: int) -> int:
    """The axis of the units after `_grouped`."""
    return 1 if groups == 1 else 2


def _ungrouped(x: Tensor, groups: int) -> Tensor:
    """The inverse of `_grouped`."""
    return x if groups == 1 else x.flatten(1, 2)


def _small(x: Tensor, groups: int) -> Tensor:
    """(N, G, 1, P, Q) -> (N, G, P, Q)."""
    return x if groups == 1 else x.squeeze(2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, G * U, P, Q) -> (N, G, U, P, Q); as it is for one group."""
    return x if groups == 1 else x.unflatten(1, (groups, -1))


def _plain_conv2d(x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    out = max_out(conv(x, weight), candidates, 1)
    norm = patch_norm(x, conv.kernel_size, conv.stride, conv.padding, (1, 1), conv.groups)
    if 1 < conv.groups < out.shape[1]:
        norm = norm.repeat_interleave(out.shape[1] // conv.groups, dim=1)
    return (out * bcos_scale(out, norm, b)).to(out.dtype)


def bcos_conv2d(x: Tensor, unit: Tensor, conv: Convolution, b: float, candidates: int, kernels: Kernels) -> Tensor:
    """The B-cos convolution of x, (N, C, H, W) -> (N, O, P, Q), for B > 1.

    Args:
        unit: ŵ, (O * `candidates`, C / G, kh, kw).
        candidates: MaxOut over that many consecutive units.
    """
    return uncast(x, unit, lambda x, unit: _BcosConv2d.apply(x, unit, conv, b, candidates, kernels))


def detached_bcos_conv2d(x: Tensor, unit: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    """:func:`bcos_conv2d` in explanation mode with a weight that gets no gradient."""
    return uncast(x, unit, lambda x, unit: _DetachedBcosConv2d.apply(x, unit, conv, b, candidates))
