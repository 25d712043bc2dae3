"""The B-cos transform as pure functions: weight normalization, MaxOut, input norms and eq. 3.

Axes: N samples, C input channels, O output units, M MaxOut candidates per unit, G groups, H W input size,
P Q output size; ``*`` any leading axes.

Squares, sums and norms are computed in float32 or float64. In float16, 300² would overflow, and 1 + 1e-6 would round
to 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PaddingMode",
    "bcos_scale",
    "bcos_transform",
    "feature_norm",
    "maxout",
    "normalize_weight",
    "patch_norm",
    "statistics_dtype",
]

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

PATCH_EPS = 1e-6  # ‖x‖ of a patch is sqrt(sum x² + 1e-6)
FEATURE_EPS = 1e-12  # ‖x‖ of a feature vector is sqrt(sum x²) + 1e-12
COSINE_EPS = 1e-6  # added to |cos| unless B = 2: the derivative of |cos|^(B-1) is infinite at 0 for B < 2


def statistics_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which sums over ``x`` are accumulated: float32, or float64 for a float64 tensor."""
    return torch.promote_types(x.dtype, torch.float32)


def normalize_weight(weight: Tensor) -> Tensor:
    """Scale every output unit (the first axis) to unit Euclidean norm: ŵ = w / ‖w‖."""
    dims = tuple(range(1, weight.dim()))
    norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True, dtype=statistics_dtype(weight))
    return (weight / norm).to(weight.dtype)


def maxout(x: Tensor, candidates: int, dim: int) -> Tensor:
    """Maximum over each ``candidates`` consecutive entries of axis ``dim`` (Goodfellow et al., 2013, arXiv 1302.4389).

    If candidates are equal, the first one gets the whole gradient, so that W(x) is the weight of one candidate;
    ``amax`` would divide the gradient among them.
    """
    if candidates == 1:
        return x
    if dim < 0:
        dim += x.dim()
    if (
        dim == 1 and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    ):  # `max` would return contiguous
        return maxout(x.permute(0, 2, 3, 1), candidates, -1).permute(0, 3, 1, 2)
    return x.unflatten(dim, (-1, candidates)).max(dim + 1).values


def bcos_scale(out: Tensor, norm: Tensor, b: float | Tensor) -> Tensor:
    """|cos(x, w)|^(B-1), the factor that turns ŵ·x into the B-cos transform (arXiv 2205.10268, eq. 3).

    With B = 2 it is |ŵ·x| / ‖x‖; otherwise 1e-6 is added to |cos|, which keeps the derivative finite at 0.

    Args:
        out: ŵ·x.
        norm: ‖x‖, broadcastable against ``out``.
        b: B ≥ 1. A tensor (learnable B) below 1 counts as 1 but keeps its own gradient, so that an optimizer can raise
            it again.

    Returns:
        Tensor of the shape of ``out``.
    """
    if isinstance(b, Tensor):
        b = b + (b.clamp(min=1) - b).detach()
    elif b == 2:
        return out.abs() / norm
    return ((out / norm).abs() + COSINE_EPS).pow(b - 1)


def bcos_transform(
    out: Tensor, norm: Tensor, b: float | Tensor, hold: Callable[[Tensor], Tensor] = lambda scale: scale
) -> Tensor:
    """|cos(x, w)|^(B-1) ŵ·x in the dtype of ``out``; arguments as for `bcos_scale`, to which ``hold`` applies."""
    return (out * hold(bcos_scale(out, norm, b))).to(out.dtype)


def is_linear(b: float | Tensor) -> bool:
    """True if B = 1: the B-cos transform is then ŵ·x itself."""
    return not isinstance(b, Tensor) and b == 1


def feature_norm(x: Tensor) -> Tensor:
    """‖x‖ + 1e-12 over the last axis, (*, C) -> (*, 1), in float32 or float64.

    Where x = 0 the norm is set to 1, which changes no output, as ŵ·x is 0, and keeps derivatives of all orders finite.
    """
    squares = x.to(statistics_dtype(x)).square().sum(-1, keepdim=True)
    is_zero = squares == 0
    return torch.where(is_zero, 1.0, squares.masked_fill(is_zero, 1.0).sqrt() + FEATURE_EPS)


def patch_norm(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
) -> Tensor:
    """Norm of every patch that a convolution sees: sqrt(sum x² + 1e-6) (arXiv 2205.10268, sec. 3.2.1).

    The squares are first summed over the channels of each group, since padding and summing over windows are cheap on
    the remaining map per group. Padding the squares is the same as squaring the padded input, in all padding modes.

    Args:
        x: (N, C, H, W).
        kernel_size, stride, dilation: Pairs (height, width).
        padding: A pair, ``"same"`` or ``"valid"``.
        groups: G, a divisor of C.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.

    Returns:
        (N, G, P, Q), in float32 or float64.
    """
    squares = x.to(statistics_dtype(x)).square()
    if groups == 1:
        squares = squares.sum(1, keepdim=True)
    elif groups < x.shape[1]:
        squares = squares.unflatten(1, (groups, -1)).sum(2)
    pad = conv_padding(kernel_size, padding, dilation)
    if any(pad):
        squares = F.pad(squares, pad, mode="constant" if padding_mode == "zeros" else padding_mode)
    return (_window_sum(squares, kernel_size, stride, dilation) + PATCH_EPS).sqrt()


def conv_padding(kernel_size: Sequence[int], padding: str | Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Padding of a convolution in the order of `F.pad`: [left, right, top, bottom]."""
    if padding == "valid":
        return [0, 0, 0, 0]
    pad: list[int] = []
    for axis in (1, 0):
        if isinstance(padding, str):  # "same"; as in nn.Conv2d, an odd total is padded by one more on the right
            total = dilation[axis] * (kernel_size[axis] - 1)
            pad += [total // 2, total - total // 2]
        else:
            pad += [padding[axis], padding[axis]]
    return pad


def _window_sum(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Sum over every window of a convolution without padding, (N, G, H, W) -> (N, G, P, Q)."""
    kernel_size, stride, dilation = tuple(kernel_size), tuple(stride), tuple(dilation)
    if kernel_size == (1, 1):
        return x if stride == (1, 1) else x[..., :: stride[0], :: stride[1]]
    if dilation == (1, 1):
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            # ONNX's average has no other divisor, and both exporters ignore it without a warning.
            return F.avg_pool2d(x, kernel_size, stride) * math.prod(kernel_size)
        return F.avg_pool2d(x, kernel_size, stride, divisor_override=1)
    # Rows, then columns, through strided views. A convolution with ones might run in TF32 on a GPU.
    for axis in (2, 3):
        k, s, d = kernel_size[axis - 2], stride[axis - 2], dilation[axis - 2]
        x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d].sum(-1)
    return x
