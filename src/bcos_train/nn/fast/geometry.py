"""What a convolution does to shapes, and its box filter.

Axes: N samples, C channels, G groups, H W input size, P Q output size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_train.nn.functional import PATCH_EPS, statistics_dtype

__all__ = ["Convolution", "can_box"]


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
