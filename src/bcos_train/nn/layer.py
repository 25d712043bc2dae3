"""What the B-cos convolution and the B-cos linear layer share."""

import math
from abc import abstractmethod

from torch import Tensor, nn

from bcos_train.nn.backend import Fusable
from bcos_train.nn.detachable import Detachable
from bcos_train.nn.functional import bcos_scale, max_out
from bcos_train.nn.kernels import Kernels
from bcos_train.nn.observers import is_hooked

__all__ = ["BcosLayer"]


class BcosLayer(Detachable, Fusable):
    """out = |cos(x, w)|^(B-1) ŵ·x, with the maximum over `max_out` candidates ŵ for each output unit.

    A subclass sets `linear` (the map x -> ŵ·x, of `max_out` times as many units) and says what ||x|| is.

    Raises:
        ValueError: `b` is below 1, not finite or not a scalar, `max_out` is below 1, or `bias` is asked for.
    """

    linear: nn.Module
    unit_dim: int  # the axis of the output units

    def __init__(self, b: float | nn.Parameter, max_out: int, bias: bool) -> None:
        super().__init__()
        if bias:
            raise ValueError("bias=True: a B-cos layer has no bias, its output is to be W(x) x alone. Leave it False.")
        if max_out < 1:
            raise ValueError(f"max_out={max_out}: expected an integer >= 1.")
        check_b(b)
        self.b = b
        self.max_out = max_out

    @abstractmethod
    def input_norm(self, x: Tensor) -> Tensor:
        """||x|| of what each output unit sees, to be broadcast against the output."""

    def product(self, x: Tensor) -> Tensor:
        """ŵ·x, the greatest of the candidates."""
        return max_out(self.linear(x), self.max_out, self.unit_dim)

    def in_blocks(self) -> bool:
        """Whether `product` may order the candidates in blocks."""
        return self.max_out > 1 and self.backend != "reference" and not is_hooked(self.linear)

    def fused(self, x: Tensor, b: float, kernels: Kernels) -> Tensor | None:
        """What `forward` computes, as one operation; None where there is none for the layer's options."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        b = self.b
        if not (isinstance(b, Tensor) or b == 1 or is_hooked(self.linear)):
            kernels = self.fused_kernels(x)
            fused = None if kernels is None else self.fused(x, b, kernels)
            if fused is not None:
                return fused
        out = self.product(x)
        if not isinstance(b, Tensor) and b == 1:
            return out
        if self.detach:
            scale = bcos_scale(out.detach(), self.input_norm(x.detach()), b.detach() if isinstance(b, Tensor) else b)
        else:
            scale = bcos_scale(out, self.input_norm(x), b)
        return (out * scale).to(out.dtype)

    def extra_repr(self) -> str:
        b = "learnable" if isinstance(self.b, Tensor) else f"{self.b:g}"
        return f"B={b}" + (f", max_out={self.max_out}" if self.max_out > 1 else "")


def check_b(b: float | nn.Parameter) -> None:
    if isinstance(b, Tensor) and (not isinstance(b, nn.Parameter) or b.dim() > 0):
        raise ValueError(
            f"b is a {type(b).__name__} of shape {tuple(b.shape)}: expected a number or a scalar nn.Parameter."
        )
    if isinstance(b, Tensor) and b.is_meta:  # has no value yet
        return
    value = b.item() if isinstance(b, Tensor) else b
    if not 1 <= value < math.inf:
        raise ValueError(f"b={value}: expected a finite number >= 1 (1 is the plain linear transform).")
