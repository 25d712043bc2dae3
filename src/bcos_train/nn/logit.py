"""The last layer: temperature and bias of the logits."""

import math

from torch import Tensor, nn

__all__ = ["LogitLayer"]


class LogitLayer(nn.Module):
    """logits / temperature + bias, both fixed numbers (arXiv 2205.10268, sec. 3.2.2; arXiv 2306.10898, sec. 3.3).

    Args:
        logit_temperature: T > 0; None: the scale is unchanged.
        logit_bias: The same number for every class; None: no bias.

    Shape:
        (*) -> (*).

    Raises:
        ValueError: T is not a finite number above 0, or the bias is not finite.
    """

    def __init__(self, logit_temperature: float | None = None, logit_bias: float | None = None) -> None:
        super().__init__()
        if logit_temperature is not None and not 0 < logit_temperature < math.inf:
            raise ValueError(f"logit_temperature={logit_temperature}: expected a finite number > 0, or None.")
        if logit_bias is not None and not math.isfinite(logit_bias):
            raise ValueError(f"logit_bias={logit_bias}: expected a finite number, or None.")
        self.logit_temperature = logit_temperature
        self.logit_bias = logit_bias

    def forward(self, x: Tensor) -> Tensor:
        if self.logit_temperature is not None:
            x = x / self.logit_temperature
        if self.logit_bias is not None:
            x = x + self.logit_bias
        return x

    def extra_repr(self) -> str:
        options = {"logit_temperature": self.logit_temperature, "logit_bias": self.logit_bias}
        return ", ".join(f"{name}={value}" for name, value in options.items() if value is not None)
