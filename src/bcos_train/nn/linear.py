"""The B-cos linear layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.nn.backend import Fusable
from bcos_train.nn.candidates import arrange, greatest
from bcos_train.nn.functional import feature_norm
from bcos_train.nn.fused import bcos_linear, detached_bcos_linear, linear
from bcos_train.nn.kernels import Kernels
from bcos_train.nn.layer import BcosLayer
from bcos_train.nn.unit_weight import Freezable, UnitWeight

__all__ = ["BcosLinear", "NormedLinear", "PlainLinear"]


class NormedLinear(UnitWeight, nn.Linear):
    """`nn.Linear` whose weight is scaled to unit norm for each output unit, at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unit_weight(), self.bias)


class PlainLinear(Freezable, Fusable, nn.Linear):
    """`nn.Linear`, faster on some processors; see :mod:`bcos_train.nn.product`."""

    def weight_in_use(self) -> Tensor:
        return self.weight.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if (frozen := self.frozen) is None else frozen
        if self.bias is not None or self.fused_kernels(x) is None:
            return F.linear(x, weight, self.bias)
        return linear(x, weight)


class BcosLinear(BcosLayer):
    """The B-cos linear layer: `out = |cos(x, w)|^(B-1) ŵ·x` (Böhle et al., 2022, arXiv 2205.10268, eq. 3).

    As `BcosConv2d`, but with the norm `||x|| + 1e-12` over the last axis. The weight,
    (out_features * max_out, in_features), is `linear.weight`.

    Args:
        in_features, out_features, device, dtype: as for `nn.Linear`.
        bias: for the sake of code written for `nn.Linear`; must be False.
        b: B >= 1, or a scalar `nn.Parameter` to learn it.
        max_out: M >= 1.

    Shapes: (*, in_features) -> (*, out_features).

    Raises:
        ValueError: a value out of range (see above).
    """

    linear: NormedLinear
    unit_dim = -1

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        b: float | nn.Parameter = 2,
        max_out: int = 1,
    ) -> None:
        super().__init__(b, max_out, bias)
        self.in_features = in_features
        self.out_features = out_features
        self.linear = NormedLinear(in_features, out_features * max_out, bias=False, device=device, dtype=dtype)

    def input_norm(self, x: Tensor) -> Tensor:
        """||x||, (*, C) -> (*, 1)."""
        return feature_norm(x)

    def product(self, x: Tensor) -> Tensor:
        if not self.in_blocks():
            return super().product(x)
        out = F.linear(x, arrange(self.linear.unit_weight(), self.max_out, 1))
        return greatest(out, self.max_out, x.dim() - 1)

    def fused(self, x: Tensor, b: float, kernels: Kernels) -> Tensor | None:
        if self.detach:
            if (unit := self.linear.frozen) is None:  # autograd alone knows whether the weight's gradient is wanted too
                return None
            if x.requires_grad:
                return detached_bcos_linear(x, unit, b, self.max_out)
        return bcos_linear(x, self.linear.unit_weight(), b, self.max_out, kernels)
