"""Explanations of large images by networks that take one size only.

Axes: N images, T targets of each image, C channels of the model's input, H W pixels.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import Method, check_counts, explaining

__all__ = ["SlidingWindow"]


@dataclass(frozen=True)
class SlidingWindow:
    """A method that explains windows of a large image one by one; each pixel gets the mean of the windows over it.

    Windows lie every ``stride`` pixels from the upper left corner, and the last ones of a row or column at the border.
    So every pixel is covered, and one far from the border by (size / stride)² windows. Each window is explained for
    all targets. The sum over a map is no logit.

    Args:
        method: (model, x, targets) -> (N, T, size, size), for instance that of a vision transformer.
        size: side of a window in pixels, what the model takes.
        stride: in pixels, from 1 to ``size``: with more, pixels would be left out. ``size`` itself for windows side by
            side, which in a grid of images of that size are the images.
        batch_size: windows that the method is given at once.

    Raises:
        ValueError: from the constructor for numbers out of these ranges; from the call for an image smaller than a
            window, shapes that don't fit together, and what the method raises.
    """

    method: Method
    size: int
    stride: int
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(size=self.size, stride=self.stride, batch_size=self.batch_size)
        if self.stride > self.size:
            raise ValueError(f"stride={self.stride} would leave pixels out between windows: at most size={self.size}")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets):
            return self._explain(model, x, targets)

    def _explain(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if min(height, width) < self.size:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than a window of {self.size}x{self.size}")
        corners = list(product(range(len(x)), self._starts(height), self._starts(width)))
        total = x.new_zeros(*targets.shape, height, width)
        coverage = x.new_zeros(len(x), 1, height, width)
        for first in range(0, len(corners), self.batch_size):
            chunk = corners[first : first + self.batch_size]
            windows = torch.stack([x[n, :, top : top + self.size, left : left + self.size] for n, top, left in chunk])
            maps = self.method(model, windows, targets[[n for n, _, _ in chunk]])
            for (n, top, left), window in zip(chunk, maps, strict=True):
                place = (n, slice(None), slice(top, top + self.size), slice(left, left + self.size))
                total[place] += window
                coverage[place] += 1
        return total / coverage

    def _starts(self, length: int) -> list[int]:
        last = length - self.size
        return sorted({*range(0, last, self.stride), last})
