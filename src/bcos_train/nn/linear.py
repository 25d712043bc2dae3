"""The B-cos linear layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.nn.backend import Accelerated, fast
from bcos_train.nn.functional import bcos_transform, feature_norm, is_linear, maxout
from bcos_train.nn.layer import BcosLayer

__all__ = ["BcosLinear", "Linear", "NormedLinear"]


class NormedLinear(Accelerated, nn.Linear):
    """`nn.Linear` whose weight is scaled to unit norm per output unit at every call: ŵ·x."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, fast.unit_weight(self), self.bias)


class Linear(Accelerated, nn.Linear):
    """`nn.Linear` with a faster matrix product on some CPUs, and a cached weight within `cached_weights`."""

    def forward(self, x: Tensor) -> Tensor:
        out = fast.linear_forward(self, x)
        return super().forward(x) if out is None else out


class BcosLinear(BcosLayer):
    """The B-cos linear layer: ``out = |cos(x, w)|^(B-1) ŵ·x`` (Böhle et al., 2022, arXiv 2205.10268, eq. 3).

    As `BcosConv2d`, but with the norm ``‖x‖ + 1e-12`` over the last axis. The weight,
    (out_features * max_out, in_features), is ``linear.weight``.

    Args:
        in_features, out_features, device, dtype: As for `nn.Linear`.
        bias, b, max_out, normalize_weight: As for `BcosConv2d`.

    Shapes:
        (*, in_features) -> (*, out_features).

    Raises:
        ValueError: ``b`` or ``max_out`` is out of range.
    """

    linear: nn.Linear
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
        *,
        normalize_weight: bool = True,
    ) -> None:
        super().__init__(b, max_out, normalize_weight)
        self.in_features = in_features
        self.out_features = out_features
        make_linear = NormedLinear if normalize_weight else nn.Linear
        self.linear = make_linear(in_features, out_features * max_out, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if (out := fast.bcos_linear_forward(self, x)) is not None:
            return out
        out = maxout(self.linear(x), self.max_out, self.unit_dim)
        if is_linear(self.b):
            return out
        return bcos_transform(out, self.input_norm(x), self.b, self.hold)

    def input_norm(self, x: Tensor) -> Tensor:
        """‖x‖, (*, C) -> (*, 1)."""
        return feature_norm(x)
