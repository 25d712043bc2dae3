"""Building blocks of the fast paths: kernels over large tensors (eager or compiled), and weight normalization.

A B-cos layer is slower than a standard one because of its memory traffic, not its arithmetic, so each function reads
and writes large tensors as few times as possible. The eager ones work in place on tensors that they have allocated,
since a new large tensor costs more than a pass over an existing one. The compiled ones read each tensor once.

Shapes: ``out``, ``y``, ``grad`` have the output units along axis ``dim``; ``norm``, ‖x‖, has size 1 there and is in
float32 or float64.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from bcos_train.nn.fast.gpu_device import uses_triton
from bcos_train.nn.fast.gpu_ops import OPS
from bcos_train.nn.fast.maxout import scatter_to_chosen
from bcos_train.nn.functional import COSINE_EPS, FEATURE_EPS, normalize_weight, statistics_dtype

if TYPE_CHECKING:
    from bcos_train.nn.fast.conv import Convolution

__all__ = [
    "EAGER",
    "Kernels",
    "compiled_kernels",
    "detached_scale",
    "has_dispatch_mode",
    "memory_format",
    "normalize",
    "normalize_on_gpu",
    "reference_backward",
    "scale_backward",
    "scale_output",
    "to_chosen",
    "write_counter",
]


@dataclass(frozen=True)
class Kernels:
    """One implementation of the kernels.

    Attributes:
        patch_norm: (x, conv) -> ‖x‖ of every patch of a convolution, (N, G, P, Q).
        feature_norm: (x) -> ‖x‖ + 1e-12 over the last axis, 1 where x = 0.
        square: (out, norm) -> y = out |out| / ‖x‖, the B-cos transform with B = 2; it may write into out.
        square_backward: (grad, y, norm, dim) -> d/d out, and s = d/d‖x‖ / ‖x‖ summed over ``dim`` (None: not summed).
            The gradient of x through its norm is x s. The pre-activation is recovered from the output:
            |out| = sqrt(|y| ‖x‖).
        power: (out, norm, b) -> y = out (|out| / ‖x‖ + 1e-6)^(B-1).
        power_backward: (grad, out, norm, b, dim) -> like `square_backward`.
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


# --- workspace --------------------------------------------------------------------------------------------------------

#: Elements per part, unless a single row has more: 4 MiB in float32, which a processor's caches hold.
PART = 2**20


def has_dispatch_mode() -> bool:
    """True if a dispatch mode is active, such as a FLOP counter or fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0


class _Workspace(threading.local):
    """Reusable buffer (CPU), one per thread and dtype.

    On a CPU a new large tensor costs more than several passes over an existing one, since the system maps and clears
    its pages first. So intermediate values go, part by part, through a small buffer. Without it ResNet-18 takes 12 %
    longer for inference at batch 32, and the same time at batch 8 (two cores). On other devices torch's allocator
    reuses memory.
    """

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """Return a tensor of arbitrary values with the shape, strides and dtype of ``x``, which is dense."""
        buffer = self.buffers.get(x.dtype)
        if buffer is None or len(buffer) < x.numel():
            with torch.inference_mode(False):  # a tensor created in inference mode can't be modified outside
                buffer = torch.empty(max(x.numel(), PART), dtype=x.dtype, device=x.device)
            self.buffers[x.dtype] = buffer
        return buffer.as_strided(x.shape, x.stride())


_WORKSPACE = _Workspace()


def parts(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors of equal length along the first axis, and yield their parts and a buffer like that of ``x``, dense.

    The buffer holds arbitrary values, and is reused for the next part.
    """
    # The workspace outlives a dispatch mode, whose tensors must not.
    if x.device.type != "cpu" or x.dim() < 2 or has_dispatch_mode():
        yield x, *others, torch.empty_like(x)
        return
    if x.numel() <= PART:
        yield x, *others, _WORKSPACE.like(x)
        return
    rows = max(1, PART * len(x) // x.numel())
    for part, *rest in zip(x.split(rows), *(other.split(rows) for other in others), strict=True):
        yield part, *rest, _WORKSPACE.like(part)


def inner_products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the inner products of the rows of two matrices, (R, K), (R, K) -> (R,), summed in ``dtype``.

    Args:
        a: Dense; ``b`` may have any strides, such as those of an expanded gradient.
    """
    sums = [torch.mul(x, y, out=buffer).sum(1, dtype=dtype) for x, y, buffer in parts(a, b)]
    return torch.cat(sums)


# --- eager and compiled kernels ---------------------------------------------------------------------------------------


def _patch_norm(x: Tensor, conv: "Convolution") -> Tensor:
    return conv.norm(x)


def _feature_norm(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=statistics_dtype(x))
    return torch.where(norm == 0, 1, norm + FEATURE_EPS)


def _share(energy: Tensor, norm: Tensor) -> Tensor:
    """-energy / norm²."""
    return (energy / norm.square()).neg_()


def _sum(x: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """Return the sum, or a copy without ``dim``: a new tensor in either case."""
    return x.to(dtype, copy=True) if dim is None else x.sum(dim, keepdim=True, dtype=dtype)


def _suited(norm: Tensor, x: Tensor) -> Tensor:
    """Return the norm in the dtype of `x` on a CPU, where operations on mixed dtypes are many times slower."""
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
    """Return the kernels compiled by `torch.compile`, to C++ on a CPU and Triton on a GPU.

    They are compiled at their first call. Calls that torch doesn't compile run eagerly: those with a ninth combination
    of dtype and layout in one process, and those under some dispatch modes.
    """
    elementwise = {name: kernel for name, kernel in vars(EAGER).items() if not name.endswith("norm")}
    return replace(EAGER, **{name: torch.compile(kernel, dynamic=True) for name, kernel in elementwise.items()})


# --- the B-cos scale --------------------------------------------------------------------------------------------------


def scale_output(out: Tensor, norm: Tensor, b: float, kernels: Kernels) -> tuple[Tensor, Tensor]:
    """Return the output, and the tensor to save for its derivative."""
    if recoverable_from_output(out, b):
        y = kernels.square(out, norm)
        return y, y
    return kernels.square(out.clone(), norm) if b == 2 else kernels.power(out, norm, b), out


def write_counter(out: Tensor) -> Tensor:
    """Return an empty tensor whose ``_version`` counts the writes to ``out`` from now on; ``out`` is a new ``x.data``.

    A layer that saves its output saves another tensor in the same memory, since autograd would refuse a backward pass
    after ``out += x``. If the counter isn't 0 then, the saved values are computed again. The counter must not hold the
    memory, which gradient checkpointing and offloading free. It takes 3 µs.
    """
    counter = out.detach()  # shares the version, also after the next line
    counter.data = out.new_empty(0)
    return counter


def recoverable_from_output(x: Tensor, b: float) -> bool:
    """True if |ŵ·x| can be recovered from the output: with B = 2, but not in float16, where small outputs underflow."""
    return b == 2 and x.dtype != torch.float16


def scale_backward(
    grad: Tensor, saved: Tensor, norm: Tensor, b: float, dim: int | None, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Compute the derivative of `scale_output`; see `Kernels.square_backward`."""
    if recoverable_from_output(saved, b):
        return kernels.square_backward(grad, saved, norm, dim)
    return kernels.power_backward(grad, saved, norm, b, dim)


def detached_scale(best: Tensor, norm: Tensor, b: float) -> Tensor:
    """Compute |cos|^(B-1) as a constant, for explanation mode."""
    scale = best.abs().div_(norm)
    return scale if b == 2 else scale.add_(COSINE_EPS).pow_(b - 1)


def to_chosen(grad: Tensor, choice: Tensor | None, candidates: int, dim: int) -> Tensor:
    """Return the gradient of all candidates; with gradients enabled, it can be differentiated again."""
    if choice is None:
        return grad
    if torch.is_grad_enabled():
        return torch.cat([grad.where(choice == index, 0) for index in range(candidates)], dim)
    return scatter_to_chosen(grad, choice, candidates, dim)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return channels_last for a tensor (N, C, H, W) that is dense in that format only, else contiguous."""
    is_channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


# --- weight normalization ---------------------------------------------------------------------------------------------


def normalize(weight: Tensor) -> Tensor:
    """Compute ŵ = w / ‖w‖ of every output unit (the first axis), like `normalize_weight`."""
    return _Normalize.apply(weight)


def normalize_on_gpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Like `normalize`, but in ``dtype`` if Triton can be used."""
    if uses_triton(weight) and weight.numel() > 0 and _is_dense(weight):
        return _NormalizeOnGPU.apply(weight, dtype)
    return _Normalize.apply(weight)


class _Normalize(torch.autograd.Function):
    """Weight normalization. Its derivative is the projection onto the complement of ŵ, divided by ‖w‖."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(_rows(weight, weight), dim=1, dtype=statistics_dtype(weight))
        unit = (weight / norm.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)
        ctx.save_for_backward(weight, unit, norm)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        weight, unit, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            return reference_backward(normalize_weight, (weight,), grad)[0]
        shape = (-1, *[1] * (weight.dim() - 1))
        along = inner_products(_rows(unit, unit), _rows(grad, unit), norm.dtype)
        return torch.addcmul(grad, unit, -along.view(shape).to(grad.dtype)).div_(norm.view(shape))


class _NormalizeOnGPU(torch.autograd.Function):
    """Weight normalization in two kernel launches; eager operations take nine, and autocast's casts two more."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        unit, norm = OPS.normalize.default(weight, dtype)
        ctx.save_for_backward(weight, norm)
        ctx.dtype = dtype
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        weight, norm = ctx.saved_tensors
        if torch.is_grad_enabled():
            return reference_backward(lambda weight: normalize_weight(weight).to(ctx.dtype), (weight,), grad)[0], None
        if grad.stride() != weight.stride():
            grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
        return OPS.normalize_backward.default(grad, weight, norm), None


def _is_dense(weight: Tensor) -> bool:
    """True if the values of each output unit are adjacent in memory."""
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """Flatten (O, ...) to a matrix in the memory order of ``weight``; for the weight itself this is a view."""
    if weight.dim() == 4 and not weight.is_contiguous():
        x = x.permute(0, 2, 3, 1)
    return x.flatten(1)


def reference_backward(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor
) -> list[Tensor | None]:
    """Return the gradients of the inputs through the definition, with a graph, for second derivatives."""
    needed = [x for x in inputs if x.requires_grad]
    grads = iter(torch.autograd.grad(function(*inputs), needed, grad, create_graph=True))
    return [next(grads) if x.requires_grad else None for x in inputs]
