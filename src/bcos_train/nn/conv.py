"""The B-cos convolution."""

import torch
from torch import Tensor, nn

from bcos_train.nn.candidates import arrange, greatest
from bcos_train.nn.functional import PaddingMode, patch_norm
from bcos_train.nn.fused import Convolution, bcos_conv2d, can_box, detached_bcos_conv2d
from bcos_train.nn.kernels import Kernels
from bcos_train.nn.layer import BcosLayer
from bcos_train.nn.observers import is_hooked
from bcos_train.nn.unit_weight import UnitWeight

__all__ = ["BcosConv2d", "NormedConv2d"]

Size = int | tuple[int, int]


class NormedConv2d(UnitWeight, nn.Conv2d):
    """`nn.Conv2d` whose weight is scaled to unit norm for each output channel, at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.unit_weight(), self.bias)


class BcosConv2d(BcosLayer):
    """The B-cos convolution (Böhle et al., 2022, arXiv 2205.10268, eq. 3 and sec. 3.2.1).

    For a patch x of the padded input and unit vectors ŵ, `out = |cos(x, w)|^(B-1) ŵ·x`, where
    `||x|| = sqrt(sum x² + 1e-6)` over the channels of the group. With `max_out=M` each output is the greatest of M
    consecutive units. The weight, (out_channels * M, in_channels / groups, kh, kw), is `linear.weight`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode, device, dtype:
            as for `nn.Conv2d`; `groups` must also divide `out_channels`, so that MaxOut stays within a group.
        b: B >= 1, or a scalar `nn.Parameter` to learn it (it may be shared between layers, and belongs in a
            parameter group without weight decay).
        max_out: M >= 1.
        bias: for the sake of code written for `nn.Conv2d`; must be False.

    Shapes: (N, C, H, W) -> (N, O, P, Q).

    Raises:
        ValueError: a value out of range (see above), or an input that is not 4-dimensional.
    """

    linear: NormedConv2d
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
    ) -> None:
        super().__init__(b, max_out, bias)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.linear = NormedConv2d(
            in_channels,
            out_channels * max_out,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=False,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        if out_channels % groups:
            raise ValueError(f"out_channels={out_channels} is not a multiple of groups={groups}.")

    def input_norm(self, x: Tensor) -> Tensor:
        """||x|| of every patch, (N, C, H, W) -> (N, 1 or O, P, Q)."""
        conv, geometry = self.linear, self._geometry()
        if geometry is not None and not (x.requires_grad and torch.is_grad_enabled()):
            norm = geometry.norm(x)
        else:
            norm = patch_norm(
                x, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
            )
        if 1 < conv.groups < self.out_channels:
            norm = norm.repeat_interleave(self.out_channels // conv.groups, dim=1)
        return norm

    def product(self, x: Tensor) -> Tensor:
        conv = self.linear
        if conv.groups > 1 or not self.in_blocks():
            return super().product(x)
        weight = arrange(conv.unit_weight(), self.max_out, 1)
        return greatest(conv._conv_forward(x, weight, None), self.max_out, 1)

    def fused(self, x: Tensor, b: float, kernels: Kernels) -> Tensor | None:
        geometry = self._geometry()
        if geometry is None:
            return None
        if self.detach:
            if (unit := self.linear.frozen) is None:  # autograd alone knows whether the weight's gradient is wanted too
                return None
            if x.requires_grad:
                return detached_bcos_conv2d(x, unit, geometry, b, self.max_out)
        return bcos_conv2d(x, self.linear.unit_weight(), geometry, b, self.max_out, kernels)

    def is_homogeneous(self) -> bool:
        """Whether s times the output is what sign(s) sqrt(abs(s)) times the weight gives."""
        is_square = not isinstance(self.b, Tensor) and self.b == 2 and self.max_out == 1
        is_watched = is_hooked(self) or is_hooked(self.linear)
        return is_square and not is_watched and self.backend != "reference"

    def _geometry(self) -> Convolution | None:
        """What the fused operations know of this convolution; None for what they can't do."""
        conv = self.linear
        if conv.padding_mode != "zeros" or conv.dilation != (1, 1) or isinstance(conv.padding, str):
            return None
        if not can_box(conv.kernel_size, conv.padding):
            return None
        return Convolution(conv.kernel_size, conv.stride, conv.padding, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"BcosConv2d got an input of shape {tuple(x.shape)}: expected (N, C, H, W).")
        return super().forward(x)
