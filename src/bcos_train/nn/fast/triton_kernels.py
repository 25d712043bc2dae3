# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of a B-cos layer; each reads and writes its large tensors once and computes in float32.

Axes: B blocks, P positions of a block, C units or channels, over which the norms are taken. A large tensor (B, P, C)
has either adjacent channels in memory (``ROWS``: channels last, linear layers; then B is 1) or adjacent positions
(contiguous images; a block is a sample). A norm or another small map is (B, P), float32.

K is the number of weights of an output unit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bcos_train.nn.fast.gpu_ops import SQUARES, window_shape
from bcos_train.nn.functional import FEATURE_EPS, PATCH_EPS

__all__ = [
    "add_product_",
    "batch_norm_constants",
    "check_device",
    "normalize",
    "normalize_backward",
    "square_",
    "square_backward",
    "sum_of_squares",
    "window_norm",
]

#: Not measured yet. Compiled for an H100, the tiles below need 30 to 70 registers with 8 warps, and 150 with 4.
WARPS = 8


@triton.jit
def _offsets(b, p, c, P, C, ROWS: tl.constexpr):
    """Return the memory offsets of positions p and channels c of block b, (BP, BC)."""
    start = tl.cast(b, tl.int64) * P * C
    if ROWS:
        return start + p[:, None].to(tl.int64) * C + c[None, :]
    return start + c[None, :].to(tl.int64) * P + p[:, None]


@triton.jit
def _sum_of_squares_kernel(
    x_ptr, sum_ptr, P, C, patch_eps, feature_eps,
    ROWS: tl.constexpr, KIND: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    p, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(2)
    is_in = p < P
    total = tl.zeros((BP,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        mask = is_in[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + _offsets(b, p, c, P, C, ROWS), mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(x * x, axis=1)
    if KIND == 1:
        total = tl.sqrt(total + patch_eps)
    if KIND == 2:
        total = tl.where(total == 0, 1.0, tl.sqrt(total) + feature_eps)
    tl.store(sum_ptr + tl.cast(b, tl.int64) * P + p, total, mask=is_in)


@triton.jit
def _window_norm_kernel(
    squares_ptr, norm_ptr, total, H, W, P, Q, sh, sw, ph, pw, eps,
    KH: tl.constexpr, KW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = place < total
    row, column = place // Q % P * sh - ph, place % Q * sw - pw
    start = place // Q // P * H * W
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(KH):
        for j in tl.static_range(KW):
            h, w = row + i, column + j
            mask = is_in & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            squares += tl.load(squares_ptr + start + h * W + w, mask=mask, other=0.0)
    tl.store(norm_ptr + place, tl.sqrt(squares + eps), mask=is_in)


@triton.jit
def _square_kernel(out_ptr, norm_ptr, P, C, ROWS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    p, c = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    b = tl.program_id(2)
    is_in = p < P
    mask = is_in[:, None] & (c < C)[None, :]
    place = _offsets(b, p, c, P, C, ROWS)
    norm = tl.load(norm_ptr + tl.cast(b, tl.int64) * P + p, mask=is_in, other=1.0)
    out = tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = out * (tl.abs(out) / norm[:, None])
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _square_backward_kernel(
    grad_ptr, kept_ptr, norm_ptr, grad_out_ptr, s_ptr, P, C,
    ROWS: tl.constexpr, KEPT_OUT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    p, b = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(2)
    is_in = p < P
    small = tl.cast(b, tl.int64) * P + p
    norm = tl.load(norm_ptr + small, mask=is_in, other=1.0)
    total = tl.zeros((BP,), tl.float32)
    for start in range(0, C, BC):
        c = start + tl.arange(0, BC)
        mask = is_in[:, None] & (c < C)[None, :]
        place = _offsets(b, p, c, P, C, ROWS)
        kept = tl.load(kept_ptr + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if KEPT_OUT:
            cosine = tl.abs(kept) / norm[:, None]
            y = kept * cosine
        else:
            cosine = tl.sqrt(tl.abs(kept) / norm[:, None])  # |y| = cosine² norm
            y = kept
        tl.store(grad_out_ptr + place, (2 * cosine * grad).to(grad_out_ptr.dtype.element_ty), mask=mask)
        total += tl.sum(grad * y, axis=1)
    tl.store(s_ptr + small, -total / (norm * norm), mask=is_in)


@triton.jit
def _add_product_kernel(a_ptr, x_ptr, s_ptr, P, C, ROWS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    p, c = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    b = tl.program_id(2)
    is_in = p < P
    mask = is_in[:, None] & (c < C)[None, :]
    place = _offsets(b, p, c, P, C, ROWS)
    s = tl.load(s_ptr + tl.cast(b, tl.int64) * P + p, mask=is_in, other=0.0)
    a = tl.load(a_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + place, (a + x * s[:, None]).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _batch_norm_constants_kernel(var_ptr, inverse_ptr, zeros_ptr, count_ptr, count, C, eps, BC: tl.constexpr):
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    is_in = c < C
    var = tl.load(var_ptr + c, mask=is_in, other=1.0)
    tl.store(inverse_ptr + c, 1.0 / tl.sqrt(var + eps), mask=is_in)
    tl.store(zeros_ptr + c, tl.zeros((BC,), tl.float32), mask=is_in)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, count)


@triton.jit
def _normalize_kernel(weight_ptr, unit_ptr, norm_ptr, K, BK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        weight = tl.load(weight_ptr + unit * K + k, mask=k < K, other=0.0).to(tl.float32)
        total += weight * weight
    norm = tl.sqrt(tl.sum(total, axis=0))
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        weight = tl.load(weight_ptr + unit * K + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(unit_ptr + unit * K + k, (weight / norm).to(unit_ptr.dtype.element_ty), mask=k < K)
    tl.store(norm_ptr + unit, norm)


@triton.jit
def _normalize_backward_kernel(grad_ptr, weight_ptr, norm_ptr, grad_weight_ptr, K, BK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64)
    norm = tl.load(norm_ptr + unit)
    total = tl.zeros((BK,), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        weight = tl.load(weight_ptr + unit * K + k, mask=k < K, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + unit * K + k, mask=k < K, other=0.0).to(tl.float32)
        total += grad * (weight / norm)
    along = tl.sum(total, axis=0)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        weight = tl.load(weight_ptr + unit * K + k, mask=k < K, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + unit * K + k, mask=k < K, other=0.0).to(tl.float32)
        grad_weight = (grad - weight / norm * along) / norm
        tl.store(grad_weight_ptr + unit * K + k, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=k < K)


# Launches. ``sizes`` is (B, P, C).


def tiles(sizes: list[int], rows: bool) -> tuple[int, int]:
    """Return BP and BC: 4096 values, with at least 256 adjacent bytes if there are that many."""
    _, positions, channels = sizes
    if rows:
        bc = min(triton.next_power_of_2(channels), 128)
        return min(4096 // bc, 1024), bc
    bp = min(triton.next_power_of_2(positions), 128)
    return bp, min(triton.next_power_of_2(channels), 4096 // bp, 32)


def sum_of_squares(x: Tensor, sizes: list[int], rows: bool, kind: int, shape: list[int]) -> Tensor:
    """Return the sum of squares of each position, or its root according to ``kind``, in the given shape."""
    bp, bc = tiles(sizes, rows)
    total = torch.empty(shape, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(sizes[1], bp), 1, sizes[0])
    eps = (PATCH_EPS, FEATURE_EPS)
    with torch.cuda.device_of(x):
        _sum_of_squares_kernel[grid](x, total, *sizes[1:], *eps, rows, kind, bp, bc, num_warps=WARPS)
    return total


def window_norm(squares: Tensor, kernel_size: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """Return sqrt(sum + 1e-6) over every window of a convolution, (N, 1, H, W) -> (N, 1, P, Q)."""
    norm = squares.new_empty(window_shape(squares, kernel_size, stride, padding))
    block = 512
    sizes = (norm.numel(), *squares.shape[2:], *norm.shape[2:])
    with torch.cuda.device_of(squares):
        _window_norm_kernel[(triton.cdiv(norm.numel(), block),)](
            squares, norm, *sizes, *stride, *padding, PATCH_EPS, *kernel_size, block
        )
    return norm


def square_(out: Tensor, norm: Tensor, sizes: list[int], rows: bool) -> None:
    """Replace out by out |out| / norm."""
    bp, bc = tiles(sizes, rows)
    grid = (triton.cdiv(sizes[1], bp), triton.cdiv(sizes[2], bc), sizes[0])
    with torch.cuda.device_of(out):
        _square_kernel[grid](out, norm, *sizes[1:], rows, bp, bc, num_warps=WARPS)


def square_backward(
    grad: Tensor, kept: Tensor, norm: Tensor, sizes: list[int], rows: bool, kept_out: bool
) -> tuple[Tensor, Tensor]:
    """Compute the derivative of `square_`.

    Args:
        kept: The output of `square_`, or with ``kept_out`` its input.

    Returns:
        d/d out, and s of each position, in the shape of ``norm``: the gradient of x through the norm is x s.
    """
    bp, bc = tiles(sizes, rows)
    grad_out, s = torch.empty_like(kept), torch.empty_like(norm)
    grid = (triton.cdiv(sizes[1], bp), 1, sizes[0])
    with torch.cuda.device_of(kept):
        _square_backward_kernel[grid](
            grad, kept, norm, grad_out, s, *sizes[1:], rows, kept_out, bp, bc, num_warps=WARPS
        )
    return grad_out, s


def add_product_(a: Tensor, x: Tensor, s: Tensor, sizes: list[int], rows: bool) -> None:
    """Replace a by a + x s; ``s`` has a value per position."""
    bp, bc = tiles(sizes, rows)
    grid = (triton.cdiv(sizes[1], bp), triton.cdiv(sizes[2], bc), sizes[0])
    with torch.cuda.device_of(a):
        _add_product_kernel[grid](a, x, s, *sizes[1:], rows, bp, bc, num_warps=WARPS)


def batch_norm_constants(var: Tensor, eps: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1 / sqrt(var + eps) and zeros, (C,) each, and the count, (1,) int32: one launch instead of four."""
    inverse, zeros = torch.empty_like(var), torch.empty_like(var)
    counts = var.new_empty(1, dtype=torch.int32)
    block = 512
    with torch.cuda.device_of(var):
        _batch_norm_constants_kernel[(triton.cdiv(len(var), block),)](
            var, inverse, zeros, counts, count, len(var), eps, block
        )
    return inverse, zeros, counts


def normalize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return w / ‖w‖ of each output unit in ``dtype``, and ‖w‖, (O,); the weight is dense."""
    units, size = len(weight), weight[0].numel()
    unit = torch.empty_like(weight, dtype=dtype)
    norm = weight.new_empty(units, dtype=torch.float32)
    with torch.cuda.device_of(weight):
        _normalize_kernel[(units,)](weight, unit, norm, size, min(triton.next_power_of_2(size), 1024))
    return unit, norm


def normalize_backward(grad: Tensor, weight: Tensor, norm: Tensor) -> Tensor:
    """Return the gradient of the weight, given that of w / ‖w‖ in the same memory format."""
    units, size = len(weight), weight[0].numel()
    grad_weight = torch.empty_like(weight)
    with torch.cuda.device_of(weight):
        _normalize_backward_kernel[(units,)](
            grad, weight, norm, grad_weight, size, min(triton.next_power_of_2(size), 1024)
        )
    return grad_weight


def check_device(device: torch.device) -> None:
    """Compile and run a kernel.

    Raises:
        RuntimeError: The result is wrong. Errors of Triton are passed on.
    """
    total = sum_of_squares(torch.full((2, 4), 3.0, device=device), [1, 2, 4], True, SQUARES, [2, 1])
    if (values := total.flatten().tolist()) != [36.0, 36.0]:
        raise RuntimeError(f"a sum of squares is {values}, not [36, 36]")
