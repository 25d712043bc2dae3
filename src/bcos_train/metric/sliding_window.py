"""Explanations of large images for networks with a fixed input size.

Axes: N images, T targets per image, C channels of the model's input, H W pixels.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import Method, attribution_context, check_positive_integers

__all__ = ["SlidingWindow"]


@dataclass(frozen=True)
class SlidingWindow:
    """Explanation method that averages explanations of overlapping windows of a large image.

    Windows start every ``stride`` pixels from the upper left corner; the last ones of a row or column lie at the
    border. So every pixel is covered, and pixels far from the border by (size / stride)² windows. Each window is
    explained for all targets. The maps don't sum to the logit.

    Args:
        method: (model, x, targets) -> (N, T, size, size), for instance for a vision transformer.
        size: Side of a window in pixels: the model's input size.
        stride: Distance of the windows in pixels, from 1 to ``size``. With ``size`` the windows are adjacent, so in a
            grid of images of that size they are the images.
        batch_size: Windows per call of the method.

    Raises:
        ValueError: In the constructor, a number is out of these ranges. In the call, an image is smaller than a window
            or shapes don't match, or whatever the method raises.
    """

    method: Method
    size: int
    stride: int
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive_integers(size=self.size, stride=self.stride, batch_size=self.batch_size)
        if self.stride > self.size:
            raise ValueError(f"stride={self.stride} would skip pixels between windows: at most size={self.size}")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets):
            return self._explain(model, x, targets)

    def _explain(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if min(height, width) < self.size:
            raise ValueError(f"an image of {height}x{width} pixels is smaller than a window of {self.size}x{self.size}")
        corners = list(product(range(len(x)), self._offsets(height), self._offsets(width)))
        total = x.new_zeros(*targets.shape, height, width)
        coverage = x.new_zeros(len(x), 1, height, width)
        for first in range(0, len(corners), self.batch_size):
            chunk = corners[first : first + self.batch_size]
            windows = torch.stack([x[n, :, top : top + self.size, left : left + self.size] for n, top, left in chunk])
            maps = self.method(model, windows, targets[[n for n, _, _ in chunk]])
            for (n, top, left), window in zip(chunk, maps, strict=True):
                region = (n, slice(None), slice(top, top + self.size), slice(left, left + self.size))
                total[region] += window
                coverage[region] += 1
        return total / coverage

    def _offsets(self, length: int) -> list[int]:
        last = length - self.size
        return sorted({*range(0, last, self.stride), last})
