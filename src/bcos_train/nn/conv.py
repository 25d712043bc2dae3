"""The B-cos convolution."""

import math

import torch
from torch import Tensor, nn

from bcos_train.nn.backend import Accelerated, fast
from bcos_train.nn.functional import PaddingMode, bcos_transform, is_linear, maxout, patch_norm
from bcos_train.nn.layer import BcosLayer

__all__ = ["BcosConv2d", "NormedConv2d"]

Size = int | tuple[int, int]


class NormedConv2d(Accelerated, nn.Conv2d):
    """`nn.Conv2d` whose weight is scaled to unit norm per output channel at every call: ŵ·x."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, fast.unit_weight(self), self.bias)


class BcosConv2d(BcosLayer):
    """The B-cos convolution (Böhle et al., 2022, arXiv 2205.10268, eq. 3 and sec. 3.2.1).

    For a patch x of the padded input and unit vectors ŵ, ``out = |cos(x, w)|^(B-1) ŵ·x``, where
    ``‖x‖ = sqrt(sum x² + 1e-6)`` over the channels of the group. With ``max_out=M`` each output is the maximum of M
    consecutive units. The weight, (out_channels * M, in_channels / groups, kh, kw), is ``linear.weight``.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype:
            As for `nn.Conv2d`; ``groups`` must also divide ``out_channels``, so that MaxOut stays within a group.
        b: B ≥ 1, or a scalar `nn.Parameter` to learn it (it may be shared between layers, and belongs in a parameter
            group without weight decay).
        max_out: M ≥ 1.
        bias: Add a bias to ŵ·x. The output is then no longer W(x) x alone; for networks under conversion
            (B-cosification, arXiv 2411.00715).
        normalize_weight: Use ŵ = w / ‖w‖; False uses w itself, as B-cosified networks do.

    Shapes:
        (N, C, H, W) -> (N, O, P, Q).

    Raises:
        ValueError: A value out of range (see above), or an input that is not 4-dimensional.
    """

    linear: nn.Conv2d
    unit_dim = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 1,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        b: float | nn.Parameter = 2,
        max_out: int = 1,
        *,
        bias: bool = False,
        normalize_weight: bool = True,
    ) -> None:
        super().__init__(b, max_out, normalize_weight)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.linear = (NormedConv2d if normalize_weight else nn.Conv2d)(
            in_channels,
            out_channels * max_out,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        # As given, for code that reads the geometry; `linear` computes with its own.
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.groups, self.padding_mode = groups, padding_mode
        self.patch_size = math.prod(self.linear.kernel_size)  # positions
        if out_channels % groups:
            raise ValueError(f"out_channels={out_channels} is not a multiple of groups={groups}.")

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"BcosConv2d got an input of shape {tuple(x.shape)}: expected (N, C, H, W).")
        if (out := fast.bcos_conv2d_forward(self, x)) is not None:
            return out
        out = maxout(self.linear(x), self.max_out, self.unit_dim)
        if is_linear(self.b):
            return out
        return bcos_transform(out, self.calc_patch_norms(x), self.b, self.hold)

    def calc_patch_norms(self, x: Tensor) -> Tensor:
        """Return `input_norm`, under its name in the official code."""
        return self.input_norm(x)

    def input_norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖ of every patch, (N, C, H, W) -> (N, 1 or O, P, Q)."""
        conv = self.linear
        norm = patch_norm(x, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
        if 1 < conv.groups < self.out_channels:
            norm = norm.repeat_interleave(self.out_channels // conv.groups, dim=1)
        return norm
