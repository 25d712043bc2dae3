"""Norms with per-sample statistics: group, instance, layer and position norm, and layer norm of tokens.

Axes: N samples, C channels, G groups, H W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.nn.backend import fast
from bcos_train.nn.detachable import Detachable
from bcos_train.nn.norm.base import Norm2d

__all__ = [
    "DetachableGNInstanceNorm2d",
    "DetachableGNLayerNorm2d",
    "DetachableGroupNorm2d",
    "DetachableLayerNorm",
    "DetachablePositionNorm2d",
    "GNInstanceNormUncentered2d",
    "GNLayerNormUncentered2d",
    "GroupNormUncentered2d",
    "PositionNormUncentered2d",
]


class DetachableGroupNorm2d(Norm2d):
    """Group norm (Wu & He, 2018): statistics over all positions of each of ``num_groups`` groups of channels.

    Raises:
        ValueError: ``num_groups`` does not divide ``num_channels``, or the input is not (N, num_channels, H, W).
    """

    centered = True

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_channels={num_channels} is not a multiple of num_groups={num_groups}.")
        super().__init__(num_channels, num_channels, eps, affine, device, dtype)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        # PyTorch's CUDA kernel returns contiguous output for channels_last input.
        if self.centered and not self.detach and (x.is_contiguous() or x.device.type == "cpu"):
            return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        grouped = x.unflatten(1, (self.num_groups, -1))
        mean, var = (self._to_channels(statistic) for statistic in fast.moments(grouped, (2, 3, 4)))
        return self.normalize(x, mean, var)

    def _to_channels(self, statistic: Tensor) -> Tensor:
        """(N, G, 1, 1, 1) -> (N, C, 1, 1)."""
        return statistic.squeeze(2).repeat_interleave(self.num_channels // self.num_groups, dim=1)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, {super().extra_repr()}"


class _OneGroupOrOnePerChannel(DetachableGroupNorm2d):
    is_per_channel: bool

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_channels if self.is_per_channel else 1, num_channels, eps, affine, device, dtype)


class DetachableGNInstanceNorm2d(_OneGroupOrOnePerChannel):
    """Instance norm: statistics over the positions of each channel."""

    is_per_channel = True


class DetachableGNLayerNorm2d(_OneGroupOrOnePerChannel):
    """Layer norm of feature maps: statistics over all channels and positions of a sample."""

    is_per_channel = False


class GroupNormUncentered2d(DetachableGroupNorm2d):
    """Group norm without mean subtraction."""

    centered = False


class GNInstanceNormUncentered2d(DetachableGNInstanceNorm2d):
    """Instance norm without mean subtraction."""

    centered = False


class GNLayerNormUncentered2d(DetachableGNLayerNorm2d):
    """Layer norm of feature maps without mean subtraction."""

    centered = False


class DetachablePositionNorm2d(Norm2d):
    """Position norm (Li et al., 2019, arXiv 1907.04312): statistics over the channels at each position."""

    centered = True

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, features, eps, affine, device, dtype)
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        if self.centered and not self.detach:  # the output is always in channels_last format
            out = F.layer_norm(x.permute(0, 2, 3, 1), (self.features,), self.weight, self.bias, self.eps)
            return out.permute(0, 3, 1, 2)
        return self.normalize(x, *fast.moments(x, (1,)))

    def extra_repr(self) -> str:
        return f"{self.features}, {super().extra_repr()}"


class PositionNormUncentered2d(DetachablePositionNorm2d):
    """Position norm without mean subtraction."""

    centered = False


class DetachableLayerNorm(Detachable, nn.LayerNorm):
    """``nn.LayerNorm`` over the last axes, for tokens, with the variance detached in explanation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.detach:
            return super().forward(x)
        mean, var = fast.moments(x, tuple(range(-len(self.normalized_shape), 0)))
        out = (x - mean) * self.hold(torch.rsqrt(var + self.eps))
        if self.weight is not None:
            out = out * self.weight
        if self.bias is not None:
            out = out + self.bias
        return out.to(x.dtype)
