"""The B-cos transform and the uncentred batch norm as single operations with derivatives by hand.

They compute what `BcosLayer` and `BatchNormUncentered2d` spell out, with less memory and traffic:

* Of y = |cos(x, w)|^(B-1) ŵ·x only the input, the small map of ||x|| and, for B = 2, the output are kept (otherwise
  ŵ·x in its place). The output is kept anyway by whatever comes next.
* ||x|| is one reduction over the channels and a box filter on what is left; its derivative is the box filter's
  adjoint and one multiplication by x.
* The uncentred batch norm takes one pass for the statistics and one for the scaling, and two for the derivative.

A derivative of the derivative (`create_graph=True`) goes through the plain operations, which are differentiable.

Axes: N samples, C channels, G groups, O output units, U = O / G units of a group, H W input size, P Q output size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.nn.candidates import arrange, choose, restore, scatter_to_chosen
from bcos_train.nn.functional import (
    COSINE_EPS,
    FEATURE_EPS,
    PATCH_EPS,
    bcos_scale,
    feature_norm,
    max_out,
    patch_norm,
    statistics_dtype,
)
from bcos_train.nn.kernels import Kernels
from bcos_train.nn.product import product
from bcos_train.nn.unit_weight import plain_backward

__all__ = [
    "Convolution",
    "bcos_conv2d",
    "bcos_linear",
    "can_box",
    "detached_bcos_conv2d",
    "detached_bcos_linear",
    "linear",
    "uncentred_batch_norm",
]


def can_box(kernel_size: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether torch's box filter takes that padding."""
    return all(2 * p <= k for p, k in zip(padding, kernel_size, strict=True))


@dataclass(frozen=True)
class Convolution:
    """A convolution's geometry: zero padding that `can_box` allows, no dilation; pairs are (height, width)."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, 1, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight, whichever are needed."""
        geometry = (self.stride, self.padding, (1, 1), False, (0, 0), self.groups)
        mask = (needs[0], needs[1], False)
        grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, mask)
        return grads[0], grads[1]

    def energy(self, x: Tensor) -> Tensor:
        """Sum of squares of each group's channels, (N, C, H, W) -> (N, G, H, W)."""
        dtype = statistics_dtype(x)
        if self.groups == x.shape[1]:
            return x.to(dtype).square()
        if self.groups == 1:
            return torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=dtype).square_()
        return torch.linalg.vector_norm(x.unflatten(1, (self.groups, -1)), dim=2, dtype=dtype).square_()

    def box(self, energy: Tensor) -> Tensor:
        """Sum over every window, (N, G, H, W) -> (N, G, P, Q)."""
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            return energy[..., :: self.stride[0], :: self.stride[1]]
        for step in self._separated():
            energy = F.avg_pool2d(energy, *step, divisor_override=1)
        return energy

    def box_adjoint(self, grad: Tensor, size: torch.Size) -> Tensor:
        """The adjoint of `box`, (N, G, P, Q) -> (N, G, H, W)."""
        opposite = tuple(k - 1 - p for k, p in zip(self.kernel_size, self.padding, strict=True))
        if self.stride == (1, 1) and can_box(self.kernel_size, opposite):  # a box filter too, of the same window
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
        """||x|| of every patch, as :func:`bcos_train.nn.functional.patch_norm`."""
        return self.box(self.energy(x)).add(PATCH_EPS).sqrt_()

    def _separated(self) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """The window as one step, or as one for the rows and one for the columns where it is large and not shared."""
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
        norm = conv.norm(x)
        out = conv(x, arrange(weight, candidates, groups))
        best, choice = choose(_grouped(out, groups), candidates, _unit_dim(groups))
        y, kept = _scale(best, _grouped(norm, groups), b, kernels)
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
        best, energy = _scale_backward(_grouped(grad, groups), kept, norm, b, summed, kernels)
        large = best if choice is None else scatter_to_chosen(best, choice, candidates, dim)
        large = _ungrouped(large, groups)
        grad_x, grad_weight = conv.backward(large, x, arrange(weight, candidates, groups), ctx.needs_input_grad)
        if ctx.needs_input_grad[0]:
            s = conv.box_adjoint(_small(energy / norm.square(), groups).neg_(), x.shape[2:])
            inputs = _viewed_groups(conv, x.shape[1])
            total = kernels.add_product(_grouped(grad_x, inputs), _grouped(x, inputs), _grouped(s, inputs))
            grad_x = _ungrouped(total, inputs)
        if ctx.needs_input_grad[1]:
            grad_weight = restore(grad_weight, candidates, groups)
        return grad_x, grad_weight, None, None, None, None


class _BcosLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, b: float, candidates: int, kernels: Kernels) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics_dtype(x))
        norm = torch.where(norm == 0, 1, norm + FEATURE_EPS)
        best, choice = choose(product(x, arrange(weight, candidates, 1)), candidates, x.dim() - 1)
        y, kept = _scale(best, norm, b, kernels)
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
        large, energy = _scale_backward(grad, kept, norm, b, -1, kernels)
        if choice is not None:
            large = scatter_to_chosen(large, choice, candidates, x.dim() - 1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = product(large, arrange(weight, candidates, 1).T)
            grad_x = kernels.add_product(grad_x, x, (energy / norm.square()).neg_())
        if ctx.needs_input_grad[1]:
            grad_weight = restore(_outer(large, x), candidates, 1)
        return grad_x, grad_weight, None, None, None


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


class _DetachedBcosLinear(torch.autograd.Function):
    """The B-cos linear layer with a constant scale and a constant weight: linear in x. It keeps the scale alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, b: float, candidates: int) -> Tensor:
        weight = arrange(weight, candidates, 1)
        best, choice = choose(product(x, weight), candidates, x.dim() - 1)
        scale = _detached_scale(best, feature_norm(x), b)
        ctx.save_for_backward(weight, scale, choice)
        ctx.candidates = candidates
        return best.mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, choice = ctx.saved_tensors
        large = _to_chosen(grad * scale, choice, ctx.candidates, grad.dim() - 1)
        # This may be differentiated again.
        grad_x = large @ weight if torch.is_grad_enabled() else product(large, weight.T)
        return grad_x, None, None, None


class _DetachedBcosConv2d(torch.autograd.Function):
    """The B-cos convolution with a constant scale and a constant weight: linear in x. It keeps the scale alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
        groups = _viewed_groups(conv, len(weight))
        weight = arrange(weight, candidates, groups)
        best, choice = choose(_grouped(conv(x, weight), groups), candidates, _unit_dim(groups))
        scale = _detached_scale(best, _grouped(conv.norm(x), groups), b)
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
        large = _to_chosen(_grouped(grad, groups) * scale, choice, candidates, dim)
        # Only the shape and the layout of the input matter.
        blank = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        grad_x, _ = conv.backward(_ungrouped(large, groups), blank, weight, (True, False))
        return grad_x, None, None, None, None


def _detached_scale(best: Tensor, norm: Tensor, b: float) -> Tensor:
    scale = best.abs().div_(norm)
    return scale if b == 2 else scale.add_(COSINE_EPS).pow_(b - 1)


def _to_chosen(grad: Tensor, choice: Tensor | None, candidates: int, dim: int) -> Tensor:
    """The gradient of all candidates; it can be differentiated again."""
    if choice is None:
        return grad
    if torch.is_grad_enabled():
        return torch.cat([grad.where(choice == index, 0) for index in range(candidates)], dim)
    return scatter_to_chosen(grad, choice, candidates, dim)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight: the sum over all leading axes of grad xᵀ, (*, O), (*, C) -> (O, C)."""
    return product(grad.reshape(-1, grad.shape[-1]).T, x.reshape(-1, x.shape[-1]).T)


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


def _scale(out: Tensor, norm: Tensor, b: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """The output, and what the derivative needs of it."""
    if b == 2:
        y = kernels.square(out, norm)
        return y, y
    return kernels.power(out, norm, b), out


def _scale_backward(
    grad: Tensor, kept: Tensor, norm: Tensor, b: float, dim: int | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    if b == 2:
        return kernels.square_backward(grad, kept, norm, dim)
    return kernels.power_backward(grad, kept, norm, b, dim)


def _plain_conv2d(x: Tensor, weight: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    out = max_out(conv(x, weight), candidates, 1)
    norm = patch_norm(x, conv.kernel_size, conv.stride, conv.padding, (1, 1), conv.groups)
    if 1 < conv.groups < out.shape[1]:
        norm = norm.repeat_interleave(out.shape[1] // conv.groups, dim=1)
    return (out * bcos_scale(out, norm, b)).to(out.dtype)


def _plain_linear(x: Tensor, weight: Tensor, b: float, candidates: int) -> Tensor:
    out = max_out(F.linear(x, weight), candidates, -1)
    return (out * bcos_scale(out, feature_norm(x), b)).to(out.dtype)


def _uncast(x: Tensor, unit: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`apply` to both in the dtype that autocast wants, if it is on, with autocast off."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return apply(x, unit)
    dtype = torch.get_autocast_dtype(kind)
    with torch.autocast(kind, enabled=False):
        return apply(x.to(dtype), unit.to(dtype))


def bcos_conv2d(x: Tensor, unit: Tensor, conv: Convolution, b: float, candidates: int, kernels: Kernels) -> Tensor:
    """The B-cos convolution of x, (N, C, H, W) -> (N, O, P, Q), for B > 1.

    Args:
        unit: ŵ, (O * `candidates`, C / G, kh, kw).
        candidates: MaxOut over that many consecutive units.
    """
    return _uncast(x, unit, lambda x, unit: _BcosConv2d.apply(x, unit, conv, b, candidates, kernels))


def detached_bcos_conv2d(x: Tensor, unit: Tensor, conv: Convolution, b: float, candidates: int) -> Tensor:
    """:func:`bcos_conv2d` in explanation mode with a weight that gets no gradient."""
    return _uncast(x, unit, lambda x, unit: _DetachedBcosConv2d.apply(x, unit, conv, b, candidates))


def bcos_linear(x: Tensor, unit: Tensor, b: float, candidates: int, kernels: Kernels) -> Tensor:
    """The B-cos linear layer of x, (*, C) -> (*, O), for B > 1; ŵ is (O * `candidates`, C)."""
    return _uncast(x, unit, lambda x, unit: _BcosLinear.apply(x, unit, b, candidates, kernels))


def detached_bcos_linear(x: Tensor, unit: Tensor, b: float, candidates: int) -> Tensor:
    """:func:`bcos_linear` in explanation mode with a weight that gets no gradient."""
    return _uncast(x, unit, lambda x, unit: _DetachedBcosLinear.apply(x, unit, b, candidates))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear`, with the product of :mod:`bcos_train.nn.product`."""
    return _uncast(x, weight, _Linear.apply)


class _UncentredBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, kernels: Kernels
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _channel_moments(x)
        inverse = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.options = (eps, kernels)
        ctx.mark_non_differentiable(mean, var)
        scale = inverse if weight is None else inverse * weight
        return (x * _as_map(scale)).to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse = ctx.saved_tensors
        eps, kernels = ctx.options
        if torch.is_grad_enabled():
            inputs = (x,) if weight is None else (x, weight)
            grads = plain_backward(lambda x, *w: _plain_batch_norm(x, w[0] if w else None, eps), inputs, grad)
            return *grads, *[None] * (4 - len(grads))
        product = _channel_product(grad, x, mean, inverse)
        grad_weight = product * inverse if weight is not None and ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None, None
        scale = inverse if weight is None else inverse * weight
        # The standard deviation's part: what every value of a channel adds to it is proportional to x - mean.
        slope = scale * inverse.square() * product / (-x.numel() / x.shape[1])
        coefficients = [_as_map(c.to(x.dtype)) for c in (scale, slope, -slope * mean)]
        return kernels.combine(grad, coefficients[0], x, *coefficients[1:]), grad_weight, None, None


def uncentred_batch_norm(
    x: Tensor, weight: Tensor | None, eps: float, kernels: Kernels
) -> tuple[Tensor, Tensor, Tensor]:
    """x / sqrt(var + eps) * weight with the statistics of the batch.

    Returns:
        The output (N, C, H, W), and the mean and the biased variance, (C,) each.
    """
    return _UncentredBatchNorm.apply(x, weight, eps, kernels)


def _plain_batch_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    scale = torch.rsqrt(x.var((0, 2, 3), correction=0) + eps)
    return x * _as_map(scale if weight is None else scale * weight)


def _as_map(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, (C,)."""
    values = x.to(statistics_dtype(x))
    if x.device.type == "cpu":  # torch's own batch norm is the fastest there
        mean, var = torch.batch_norm_update_stats(values, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    return mean, var


def _channel_product(grad: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """Sum of grad * x of every channel, (C,)."""
    if x.device.type == "cpu":
        values, statistics, mask = (grad.to(mean.dtype), x.to(mean.dtype)), (mean, inverse), (False, True, True)
        grads = torch.ops.aten.native_batch_norm_backward(*values, None, None, None, *statistics, True, 0.0, mask)
        return grads[1] / inverse + mean * grads[2]
    return (grad.to(mean.dtype) * x).sum((0, 2, 3))
