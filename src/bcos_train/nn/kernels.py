"""The elementwise passes of the fused operations: by hand for eager mode, or compiled.

A B-cos layer costs more than an ordinary one not by its arithmetic but by the memory traffic around it, so each
function reads and writes its large tensors as few times as it can. The eager ones work in place on what they have
made themselves: a fresh tensor costs more than a pass over an old one. The compiled ones take one pass each.

Shapes: `out`, `y`, `grad` have the output units along axis `dim`; `norm`, ||x||, has 1 there and is in float32 or
float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bcos_train.nn.functional import COSINE_EPS, FEATURE_EPS, statistics_dtype
from bcos_train.nn.scratch import parts

if TYPE_CHECKING:
    from bcos_train.nn.fused.geometry import Convolution

__all__ = ["EAGER", "Kernels", "compiled_kernels"]


@dataclass(frozen=True)
class Kernels:
    """
    Attributes:
        patch_norm: (x, conv) -> ||x|| of every patch of a convolution, (N, G, P, Q).
        feature_norm: (x) -> ||x|| + 1e-12 over the last axis, 1 where x = 0.
        square: (out, norm) -> y = out |out| / ||x||, the B-cos transform with B = 2; it may write into out.
        square_backward: (grad, y, norm, dim) -> d/d out, and s = d/d||x|| / ||x|| summed over `dim` (None: not at
            all): the input's gradient by way of its norm is x s. The output tells all, since |out| = sqrt(|y| ||x||).
        power: (out, norm, b) -> y = out (|out| / ||x|| + 1e-6)^(B-1).
        power_backward: (grad, out, norm, b, dim) -> as `square_backward`.
        add_product: (a, x, s) -> a + x s; it may write into a.
        combine: (grad, a, x, b, c) -> a grad + b x + c.
    """

    patch_norm: Callable[[Tensor, "Convolution"], Tensor]
    feature_norm: Callable[[Tensor], Tensor]
    square: Callable[[Tensor, Tensor], Tensor]
    square_backward: Callable[[Tensor, Tensor, Tensor, int | None], tuple[Tensor, Tensor]]
    power: Callable[[Tensor, Tensor, float], Tensor]
    power_backward: Callable[[Tensor, Tensor, Tensor, float, int | None], tuple[Tensor, Tensor]]
    add_product: Callable[[Tensor, Tensor, Tensor], Tensor]
    combine: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _patch_norm(x: Tensor, conv: "Convolution") -> Tensor:
    return conv.norm(x)


def _feature_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics_dtype(x))
    return torch.where(norm == 0, 1, norm + FEATURE_EPS)


def _share(energy: Tensor, norm: Tensor) -> Tensor:
    """-energy / norm²."""
    return (energy / norm.square()).neg_()


def _sum(x: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """A tensor of its own in any case."""
    return x.to(dtype, copy=True) if dim is None else x.sum(dim, keepdim=True, dtype=dtype)


def _suited(norm: Tensor, x: Tensor) -> Tensor:
    """The norm in the dtype of `x` on a CPU, where operations on two dtypes are many times as slow."""
    return norm.to(x.dtype) if x.device.type == "cpu" else norm


def _square(out: Tensor, norm: Tensor) -> Tensor:
    if is_compiling():
        return out.mul_(out.abs() / norm)
    for part, part_norm, scale in parts(out, _suited(norm, out)):
        part.mul_(torch.abs(part, out=scale).div_(part_norm))
    return out


def _square_backward(grad: Tensor, y: Tensor, norm: Tensor, dim: int | None) -> tuple[Tensor, Tensor]:
    if is_compiling():
        wide = grad.to(norm.dtype)
        return (2 * (y.abs() / norm).sqrt() * wide).to(grad.dtype), _share(_sum(wide * y, dim, norm.dtype), norm)
    buffer = grad * y
    energy = _sum(buffer, dim, norm.dtype)
    torch.abs(y, out=buffer)
    return buffer.div_(_suited(norm / 4, y)).sqrt_().mul_(grad), _share(energy, norm)


def _power(out: Tensor, norm: Tensor, b: float) -> Tensor:
    if is_compiling():
        return (out * (out.abs() / norm + COSINE_EPS).pow(b - 1)).to(out.dtype)
    return out.abs().div_(_suited(norm, out)).add_(COSINE_EPS).pow_(b - 1).mul_(out)


def _power_backward(grad: Tensor, out: Tensor, norm: Tensor, b: float, dim: int | None) -> tuple[Tensor, Tensor]:
    if is_compiling():
        wide = grad.to(norm.dtype)
        cosine = out.abs() / norm
        power = (cosine + COSINE_EPS).pow(b - 2)
        slope = (b - 1) * cosine * power
        energy = _sum(wide * out * slope, dim, norm.dtype)
        return ((power * (cosine + COSINE_EPS) + slope) * wide).to(grad.dtype), _share(energy, norm)
    cosine = out.abs().div_(_suited(norm, out))
    slope = (cosine + COSINE_EPS).pow_(b - 2)
    scale = (cosine + COSINE_EPS).mul_(slope)
    slope.mul_(cosine).mul_(b - 1)
    energy = _sum(cosine.copy_(grad).mul_(out).mul_(slope), dim, norm.dtype)
    return scale.add_(slope).mul_(grad), _share(energy, norm)


def _add_product(a: Tensor, x: Tensor, s: Tensor) -> Tensor:
    if is_compiling():
        return (a + x * s).to(a.dtype)
    return a.addcmul_(x, s.to(x.dtype))


def _combine(grad: Tensor, a: Tensor, x: Tensor, b: Tensor, c: Tensor) -> Tensor:
    if is_compiling():
        return (grad * a + x * b + c).to(grad.dtype)
    return (grad * a).addcmul_(x, b).add_(c)


EAGER = Kernels(
    patch_norm=_patch_norm,
    feature_norm=_feature_norm,
    square=_square,
    square_backward=_square_backward,
    power=_power,
    power_backward=_power_backward,
    add_product=_add_product,
    combine=_combine,
)


@cache
def compiled_kernels() -> Kernels:
    """The same through `torch.compile`: C++ on a CPU, Triton on a GPU.

    They are compiled at their first call. What torch doesn't compile (the ninth combination of dtype and layout in one
    process; what some dispatch mode watches) runs eagerly.
    """
    elementwise = {name: kernel for name, kernel in vars(EAGER).items() if not name.endswith("norm")}
    return replace(EAGER, **{name: torch.compile(kernel, dynamic=True) for name, kernel in elementwise.items()})
