"""The fused B-cos convolution.

Axes: N samples, C channels, G groups, O output units, U = O / G units of a group, H W input size, P Q output size.
"""

from typing import Any

import torch
from torch import Tensor

from bcos_train.nn.fast.geometry import Convolution
from bcos_train.nn.fast.kernels import Kernels
from bcos_train.nn.fast.maxout import from_blocked, maxout_with_indices, to_blocked
from bcos_train.nn.fast.transform import (
    apply_in_autocast_dtype,
    detached_scale,
    scale_backward,
    scale_output,
    to_chosen,
)
from bcos_train.nn.fast.unit_weight import reference_backward
from bcos_train.nn.functional import bcos_scale, maxout, patch_norm

__all__ = ["bcos_conv2d", "detached_bcos_conv2d"]


class _BcosConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int, kernels: Kernels
    ) -> Tensor:
        groups = _viewed_groups(conv, len(weight))
        norm = conv.norm(x)
        out = conv(x, to_blocked(weight, candidates, groups))
        best, choice = maxout_with_indices(_grouped(out, groups), candidates, _unit_dim(groups))
        y, kept = scale_output(best, _grouped(norm, groups), b, kernels)
        ctx.save_for_backward(x, weight, norm, kept, choice)
        ctx.options = (conv, b, candidates, kernels)
        return _ungrouped(y, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm, kept, choice = ctx.saved_tensors
        conv, b, candidates, kernels = ctx.options
        if torch.is_grad_enabled():
            grads = reference_backward(lambda x, w: _plain_conv2d(x, w, conv, b, candidates), (x, weight), grad)
            return *grads, *[None] * 4
        groups = _viewed_groups(conv, len(weight))
        dim = _unit_dim(groups)
        norm = _grouped(norm, groups)
        # With a single unit in each group there is nothing to sum over.
        summed = None if len(weight) == conv.groups else dim
        best, energy = scale_backward(_grouped(grad, groups), kept, norm, b, summed, kernels)
        large = _ungrouped(to_chosen(best, choice, candidates, dim), groups)
        grad_x, grad_weight = conv.backward(large, x, to_blocked(weight, candidates, groups), ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            s = conv.box_adjoint(_small(energy / norm.square(), groups).neg_(), x.shape[2:])
            inputs = _viewed_groups(conv, x.shape[1])
            total = kernels.add_product(_grouped(grad_x, inputs), _grouped(x, inputs), _grouped(s, inputs))
            grad_x = _ungrouped(total, inputs)
        if ctx.needs_input_grad[1]:
            grad_weight = from_blocked(grad_weight, candidates, groups)
        return grad_x, grad_weight, None, None, None, None


class _DetachedBcosConv2d(torch.autograd.Function):
    """The B-cos convolution with a constant scale and a constant weight: linear in x. It keeps the scale alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
        groups = _viewed_groups(conv, len(weight))
        weight = to_blocked(weight, candidates, groups)
        best, choice = maxout_with_indices(_grouped(conv(x, weight), groups), candidates, _unit_dim(groups))
        scale = detached_scale(best, _grouped(conv.norm(x), groups), b)
        ctx.save_for_backward(weight, scale, choice)
        ctx.options = (conv, candidates, x.shape, _memory_format(x))
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


def _memory_format(x: Tensor) -> torch.memory_format:
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, G * U, P, Q) -> (N, G, U, P, Q); as it is for one group."""
    return x if groups == 1 else x.unflatten(1, (groups, -1))


def _plain_conv2d(x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    out = maxout(conv(x, weight), candidates, 1)
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
    return apply_in_autocast_dtype(x, unit, lambda x, unit: _BcosConv2d.apply(x, unit, conv, b, candidates, kernels))


def detached_bcos_conv2d(x: Tensor, unit: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    """:func:`bcos_conv2d` in explanation mode with a weight that gets no gradient."""
    return apply_in_autocast_dtype(x, unit, lambda x, unit: _DetachedBcosConv2d.apply(x, unit, conv, b, candidates))
