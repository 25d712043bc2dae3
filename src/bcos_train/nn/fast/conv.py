"""The B-cos convolution as one autograd function.

Axes: N samples, C channels, G groups, O output units, U = O / G units of a group, H W input size, P Q output size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.nn.fast.kernels import (
    Kernels,
    detached_scale,
    memory_format,
    reference_backward,
    scale_backward,
    scale_output,
    to_chosen,
    write_counter,
)
from bcos_train.nn.fast.maxout import from_blocked, maxout_with_indices, to_blocked
from bcos_train.nn.functional import PATCH_EPS, bcos_transform, maxout, patch_norm, statistics_dtype

__all__ = ["Convolution", "bcos_conv2d", "can_box", "detached_bcos_conv2d"]


def can_box(kernel_size: Sequence[int], padding: Sequence[int]) -> bool:
    """True if torch's box filter accepts this padding."""
    return all(2 * p <= k for p, k in zip(padding, kernel_size, strict=True))


@dataclass(frozen=True)
class Convolution:
    """Geometry of a convolution with zero padding that `can_box` allows, and no dilation; pairs are (height, width)."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and of the weight, as far as ``needs`` says."""
        geometry = (self.stride, self.padding, (1, 1), False, (0, 0), self.groups)
        mask = (needs[0], needs[1], False)
        grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)
        return grads[0], grads[1]

    def energy(self, x: Tensor) -> Tensor:
        """Return the sum of squares over the channels of each group, (N, C, H, W) -> (N, G, H, W)."""
        dtype = statistics_dtype(x)
        if self.groups == x.shape[1]:
            return x.to(dtype).square()
        if self.groups == 1:
            return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).square_()
        return torch.linalg.vector_norm(x.unflatten(1, (self.groups, -1)), dim=2, dtype=dtype).square_()

    def box(self, energy: Tensor) -> Tensor:
        """Return the sum over every window, (N, G, H, W) -> (N, G, P, Q)."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            return energy[..., :: self.stride[0], :: self.stride[1]]
        for step in self._separated():
            energy = F.avg_pool2d(energy, *step, divisor_override=1)
        return energy

    def box_adjoint(self, grad: Tensor, size: torch.Size) -> Tensor:
        """Apply the adjoint of `box`, (N, G, P, Q) -> (N, G, H, W)."""
        opposite = tuple(k - 1 - p for k, p in zip(self.kernel_size, self.padding, strict=True))
        if self.stride == (1, 1) and can_box(
            self.kernel_size, opposite
        ):  # the adjoint is a box filter of the same window
            return replace(self, padding=opposite).box(grad)
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            result = grad.new_zeros((*grad.shape[:2], *size))
            result[..., :: self.stride[0], :: self.stride[1]] = grad
            return result
        steps = self._separated()[::-1]
        sizes = [torch.Size((grad.shape[2], size[1])), size][-len(steps) :]
        for step, target in zip(steps, sizes, strict=True):
            blank = grad.new_empty((1,)).expand(*grad.shape[:2], *target)
            grad = torch.ops.aten.avg_pool2d_backward(grad, blank, *step, False, True, 1)
        return grad

    def norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖ of every patch, like :func:`bcos_train.nn.functional.patch_norm`."""
        return self.box(self.energy(x)).add(PATCH_EPS).sqrt_()

    def _separated(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Return kernel, stride and padding of the window, split into column and row if large and with groups."""
        if self.groups == 1 or self.kernel_size[0] * self.kernel_size[1] <= 9:
            return [(self.kernel_size, self.stride, self.padding)]
        return [
            ((self.kernel_size[0], 1), (self.stride[0], 1), (self.padding[0], 0)),
            ((1, self.kernel_size[1]), (1, self.stride[1]), (0, self.padding[1])),
        ]


class _BcosConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int, kernels: Kernels
    ) -> Tensor:
        groups = _viewed_groups(conv, len(weight))
        norm = kernels.patch_norm(x, conv)
        best, choice = _candidates(conv, x, weight, candidates, groups)
        y, saved = scale_output(best, _grouped(norm, groups), b, kernels)
        out = _ungrouped(y, groups).data
        ctx.writes = write_counter(out) if saved is y else None
        ctx.save_for_backward(x, weight, norm, saved, choice)
        ctx.options = (conv, b, candidates, kernels)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm, saved, choice = ctx.saved_tensors
        conv, b, candidates, kernels = ctx.options
        if torch.is_grad_enabled():
            grads = reference_backward(lambda x, w: _reference_conv2d(x, w, conv, b, candidates), (x, weight), grad)
            return *grads, *[None] * 4
        groups = _viewed_groups(conv, len(weight))
        dim = _unit_dim(groups)
        norm = _grouped(norm, groups)
        if ctx.writes is not None and ctx.writes._version:
            saved = scale_output(_candidates(conv, x, weight, candidates, groups)[0], norm, b, kernels)[1]
        # With one unit per group there is no axis to sum over.
        summed = None if len(weight) == conv.groups else dim
        best, s = scale_backward(_grouped(grad, groups), saved, norm, b, summed, kernels)
        large = _ungrouped(to_chosen(best, choice, candidates, dim), groups)
        grad_x, grad_weight = conv.backward(large, x, to_blocked(weight, candidates, groups), ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            s = conv.box_adjoint(s if groups == 1 else s.squeeze(2), x.shape[2:])
            inputs = _viewed_groups(conv, x.shape[1])
            total = kernels.add_product(_grouped(grad_x, inputs), _grouped(x, inputs), _grouped(s, inputs))
            grad_x = _ungrouped(total, inputs)
        if ctx.needs_input_grad[1]:
            grad_weight = from_blocked(grad_weight, candidates, groups)
        return grad_x, grad_weight, None, None, None, None


class _DetachedBcosConv2d(torch.autograd.Function):
    """The B-cos convolution with a constant scale and weight, which is linear in x. It doesn't save the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
        groups = _viewed_groups(conv, len(weight))
        best, choice = _candidates(conv, x, weight, candidates, groups)
        scale = detached_scale(best, _grouped(conv.norm(x), groups), b)
        ctx.save_for_backward(to_blocked(weight, candidates, groups), scale, choice)
        ctx.options = (conv, candidates, x.shape, memory_format(x))
        return _ungrouped(best.mul_(scale), groups).data  # a view can't be modified in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, choice = ctx.saved_tensors
        conv, candidates, shape, layout = ctx.options
        groups = _viewed_groups(conv, len(weight))
        dim = _unit_dim(groups)
        # Differentiable operations only, since this may be differentiated again.
        large = to_chosen(_grouped(grad, groups) * scale, choice, candidates, dim)
        # For the gradient of the input, only the shape and the layout of the input matter.
        blank = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        grad_x, _ = conv.backward(_ungrouped(large, groups), blank, weight, (True, False))
        return grad_x, None, None, None, None


def _candidates(
    conv: Convolution, x: Tensor, weight: Tensor, candidates: int, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Return ŵ·x of the largest candidate, (N, O, P, Q) or grouped, and its index; None if there is only one."""
    if candidates == 1:
        return _grouped(conv(x, weight), groups), None
    out = conv(x, to_blocked(weight, candidates, groups))
    return maxout_with_indices(_grouped(out, groups), candidates, _unit_dim(groups))


def _viewed_groups(conv: Convolution, channels: int) -> int:
    """Return the number of groups to unflatten ``channels`` into: 1 if each group has a single channel."""
    return 1 if channels == conv.groups else conv.groups


def _unit_dim(groups: int) -> int:
    """Return the axis of the units after `_grouped`."""
    return 1 if groups == 1 else 2


def _ungrouped(x: Tensor, groups: int) -> Tensor:
    """The inverse of `_grouped`."""
    return x if groups == 1 else x.flatten(1, 2)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, G * U, P, Q) -> (N, G, U, P, Q); unchanged for one group."""
    return x if groups == 1 else x.unflatten(1, (groups, -1))


def _reference_conv2d(x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    out = maxout(conv(x, weight), candidates, 1)
    norm = patch_norm(x, conv.kernel_size, conv.stride, conv.padding, (1, 1), conv.groups)
    if 1 < conv.groups < out.shape[1]:
        norm = norm.repeat_interleave(out.shape[1] // conv.groups, dim=1)
    return bcos_transform(out, norm, b)


def bcos_conv2d(x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int, kernels: Kernels) -> Tensor:
    """B-cos convolution of x, (N, C, H, W) -> (N, O, P, Q), for B > 1.

    Args:
        weight: ŵ, (O * ``candidates``, C / G, kh, kw).
        candidates: MaxOut over that many consecutive units.
    """
    return _BcosConv2d.apply(x, weight, conv, b, candidates, kernels)


def detached_bcos_conv2d(x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    """`bcos_conv2d` in explanation mode with a weight that needs no gradient."""
    return _DetachedBcosConv2d.apply(x, weight, conv, b, candidates)
