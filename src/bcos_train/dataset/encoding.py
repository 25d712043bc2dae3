"""Convert uint8 RGB batches to the float input of a model, on the device.

Axes: N batch, C channels, H height, W width. The values are bit-identical to those of the official CPU transforms.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BcosEncoding",
    "Standardize",
    "add_inverse",
    "to_float",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_float(images: Tensor) -> Tensor:
    """Scale uint8 images of any shape to float32 in [0, 1].

    Raises:
        ValueError: The images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 in [0, 255], not {images.dtype}")
    # A tensor instead of a number: CUDA multiplies by a number's reciprocal, whose last bit can differ from the CPU's.
    return images.to(torch.float32) / torch.full((), 255.0, device=images.device)


def add_inverse(x: Tensor) -> Tensor:
    """Concatenate ``(…, C, H, W)`` in [0, 1] and its complement to ``(…, 2C, H, W)``: ``[x, 1 - x]``.

    With the complements, colors differ in direction and no pixel is zero (Böhle et al., CVPR 2022, section 3.3).
    """
    return torch.cat([x, 1 - x], dim=-3)


class BcosEncoding(nn.Module):
    """Input of B-cos models: uint8 ``(N, 3, H, W)`` -> float32 ``(N, 6, H, W)``, channels [r, g, b, 1-r, 1-g, 1-b]."""

    in_channels = 6

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(to_float(images))

    def encode(self, x: Tensor) -> Tensor:
        """Encode float images: ``(N, 3, H, W)`` in [0, 1] -> ``(N, 6, H, W)``."""
        return add_inverse(x)


class Standardize(nn.Module):
    """Input of standard models: uint8 ``(N, 3, H, W)`` -> float32 ``(N, 3, H, W)``, ``(x - mean) / std`` by channel."""

    in_channels = 3
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(f"mean and std must have 3 values each, std above 0; got mean={mean}, std={std}")
        # Constants, not weights: not part of the state dict.
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(to_float(images))

    def encode(self, x: Tensor) -> Tensor:
        """Encode float images: ``(N, 3, H, W)`` in [0, 1] -> standardized ``(N, 3, H, W)``."""
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        mean, std = ([round(v, 4) for v in buffer.flatten().tolist()] for buffer in (self.mean, self.std))
        return f"mean={mean}, std={std}"
