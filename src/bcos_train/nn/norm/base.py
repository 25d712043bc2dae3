"""Base class of the 2-D norms: affine parameters and the normalization itself.

Axes: N samples, C channels, H W pixels.
"""

import torch
from torch import Tensor, nn

from bcos_train.nn.detachable import Detachable

__all__ = ["Norm2d"]


class Norm2d(Detachable):
    """Norm of (N, C, H, W) tensors with a weight and a bias, either of which may be None.

    A ``centered`` norm subtracts the mean. An uncentered norm also divides by the standard deviation *about the mean*
    but subtracts nothing. Without a bias it is a pure scaling, so W(x) x is the whole output (arXiv 2306.10898,
    sec. 3.2).

    In explanation mode the standard deviation is a constant to autograd; the mean, which is linear in the input, is
    not.
    """

    centered: bool
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        num_parameters: int,
        eps: float,
        affine: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        for name in ("weight", "bias"):
            values = torch.empty(num_parameters, device=device, dtype=dtype) if affine else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weights to 1 and biases to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError unless ``x`` is (N, num_channels, H, W)."""
        if x.dim() != 4:
            raise ValueError(f"{type(self).__name__} got an input of shape {tuple(x.shape)}: expected (N, C, H, W).")
        if x.shape[1] != self.num_channels:
            raise ValueError(
                f"{type(self).__name__} got an input of shape {tuple(x.shape)}: expected {self.num_channels} channels."
            )

    def normalize(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias, in the dtype and memory format of ``x``.

        Args:
            x: (N, C, H, W).
            mean, var: Broadcastable to ``x``, in float32 or float64; an uncentered norm doesn't subtract the mean.
        """
        scale = self.hold(torch.rsqrt(var + self.eps))
        if self.weight is not None:
            scale = scale * self.weight.view(1, -1, 1, 1)
        # The mean isn't folded into the bias: the difference would lose precision if the mean is much larger than the
        # deviation.
        out = (x - mean if self.centered else x) * scale
        if self.bias is not None:
            out = out + self.bias.view(1, -1, 1, 1)
        return out.to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, weight={self.weight is not None}, bias={self.bias is not None}"
