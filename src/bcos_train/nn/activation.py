"""Activations of networks under conversion; B-cos networks trained from scratch have none."""

import math

from torch import Tensor, nn

from bcos_train.nn.detachable import Detachable

__all__ = ["DetachableGELU", "DetachableReLU"]


class DetachableGELU(Detachable, nn.GELU):
    """GELU, x Φ(x); in explanation mode the gate Φ(x) is a constant to autograd (arXiv 2411.00715).

    Shape:
        (*) -> (*).
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.detach:
            return super().forward(x)
        if self.approximate == "tanh":
            gate = 0.5 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))).tanh())
        else:
            gate = 0.5 * (1 + (x / math.sqrt(2)).erf())
        return x * self.hold(gate)


class DetachableReLU(Detachable, nn.ReLU):
    """ReLU. It is piecewise linear, so its gradient is the dynamic linear map in either mode.

    Shape:
        (*) -> (*).
    """
