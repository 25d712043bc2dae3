"""Options shared by the B-cos convolution and the B-cos linear layer."""

import math
from abc import abstractmethod

from torch import Tensor, nn

from bcos_train.nn.backend import Accelerated
from bcos_train.nn.detachable import Detachable

__all__ = ["BcosLayer"]


class BcosLayer(Detachable, Accelerated):
    """Base class of the B-cos layers: out = |cos(x, w)|^(B-1) ŵ·x, maximized over ``max_out`` candidates ŵ per unit.

    Subclasses define ``linear`` (the map x -> ŵ·x, with ``max_out`` times as many units), ``input_norm`` (‖x‖) and
    ``forward``.

    Raises:
        ValueError: ``b`` is below 1, not finite or not a scalar, or ``max_out`` is below 1.
    """

    linear: nn.Module
    unit_dim: int  # axis of the output units

    def __init__(self, b: float | nn.Parameter, max_out: int, normalize_weight: bool) -> None:
        super().__init__()
        if max_out < 1:
            raise ValueError(f"max_out={max_out}: expected an integer >= 1.")
        check_b(b)
        self.b = b
        self.max_out = max_out
        self.normalize_weight = normalize_weight

    @abstractmethod
    def input_norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖ of the input of each output unit (the patch, for a convolution), broadcastable to the output."""

    def extra_repr(self) -> str:
        b = "learnable" if isinstance(self.b, Tensor) else f"{self.b:g}"
        max_out = f", max_out={self.max_out}" if self.max_out > 1 else ""
        return f"B={b}{max_out}" + ("" if self.normalize_weight else ", normalize_weight=False")


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
