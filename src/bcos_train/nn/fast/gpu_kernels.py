"""The kernels of a B-cos layer on a GPU: Triton kernels, and eager operations where those don't apply.

The Triton kernels take float32, bfloat16 and float16 tensors that are contiguous or channels-last. Eager operations
compute all other tensors, the scale for another B than 2, and the norms of several groups.
"""

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bcos_train.nn.fast.gpu_device import uses_triton
from bcos_train.nn.fast.gpu_ops import FEATURE_NORM, OPS, PATCH_NORM, SQUARES
from bcos_train.nn.fast.kernels import EAGER

if TYPE_CHECKING:
    from bcos_train.nn.fast.conv import Convolution

__all__ = ["GPU"]

_MAX_BLOCKS = 65535  # of CUDA's grids


def _layout(x: Tensor, axis: int) -> tuple[list[int], bool] | None:
    """Return the sizes [B, P, C] of ``x`` in the kernels, and True if channels are adjacent; None if no kernel fits.

    Args:
        axis: Axis of the channels.
    """
    channels = x.shape[axis]
    if x.is_contiguous():
        positions = prod(x.shape[axis + 1 :])
        if positions == 1:
            return [1, x.numel() // max(channels, 1), channels], True
        blocks = prod(x.shape[:axis])
        return ([blocks, positions, channels], False) if blocks <= _MAX_BLOCKS else None
    if axis == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return [1, x.numel() // max(channels, 1), channels], True
    return None


def _common_layout(x: Tensor, small: Tensor, *others: Tensor) -> tuple[list[int], bool] | None:
    """Return `_layout` of ``x`` if all ``others`` have the same one and ``small`` has one value per position."""
    axes = [axis for axis, size in enumerate(small.shape) if size != x.shape[axis]]
    axis = axes[0] if axes else x.dim() - 1
    fits = uses_triton(x) and small.dtype == torch.float32 and small.is_contiguous() and x.numel() > 0
    if not fits or len(axes) > 1 or small.shape[axis] != 1:
        return None
    if any(other.dtype != x.dtype or other.shape != x.shape or other.stride() != x.stride() for other in others):
        return None
    return _layout(x, axis)


def _patch_norm(x: Tensor, conv: "Convolution") -> Tensor:
    layout = _layout(x, 1) if conv.groups == 1 and x.numel() and uses_triton(x) else None
    if layout is None:
        return EAGER.patch_norm(x, conv)
    shape = [len(x), 1, *x.shape[2:]]
    if conv.kernel_size == conv.stride == (1, 1) and conv.padding == (0, 0):
        return OPS.sum_of_squares.default(x, *layout, PATCH_NORM, shape)
    squares = OPS.sum_of_squares.default(x, *layout, SQUARES, shape)
    return OPS.window_norm.default(squares, conv.kernel_size, conv.stride, conv.padding)


def _feature_norm(x: Tensor) -> Tensor:
    layout = _layout(x, x.dim() - 1) if x.numel() and uses_triton(x) else None
    if layout is None:
        return EAGER.feature_norm(x)
    return OPS.sum_of_squares.default(x, *layout, FEATURE_NORM, [*x.shape[:-1], 1])


def _square(out: Tensor, norm: Tensor) -> Tensor:
    layout = _common_layout(out, norm)
    if layout is None:
        return EAGER.square(out, norm)
    OPS.square_.default(out, norm, *layout)
    return out


def _square_backward(grad: Tensor, y: Tensor, norm: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    grad = _like(grad, y)
    layout = None if dim is None else _common_layout(y, norm, grad)
    if layout is None:
        return EAGER.square_backward(grad, y, norm, dim)
    return OPS.square_backward.default(grad, y, norm, *layout, False)


def _power_backward(grad: Tensor, out: Tensor, norm: Tensor, b: float, dim: int | None) -> tuple[Tensor, Tensor]:
    grad = _like(grad, out)
    layout = None if dim is None or b != 2 else _common_layout(out, norm, grad)
    if layout is None:
        return EAGER.power_backward(grad, out, norm, b, dim)
    return OPS.square_backward.default(grad, out, norm, *layout, True)


def _add_product(a: Tensor, x: Tensor, s: Tensor) -> Tensor:
    layout = _common_layout(a, s, x)
    if layout is None:
        return EAGER.add_product(a, x, s)
    OPS.add_product_.default(a, x, s, *layout)
    return a


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient in the layout of ``x``, a copy if it has another one."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x, dtype=grad.dtype).copy_(grad)


GPU = replace(
    EAGER,
    patch_norm=_patch_norm,
    feature_norm=_feature_norm,
    square=_square,
    square_backward=_square_backward,
    power_backward=_power_backward,
    add_product=_add_product,
)
