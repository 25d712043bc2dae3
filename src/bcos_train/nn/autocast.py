"""Autocast, for the autograd functions of the layers."""

import torch
from torch import Tensor

from bcos_train.nn.gpu.device import is_on_gpu

__all__ = ["autocast_dtype", "autocast_type"]


def autocast_type(x: Tensor) -> str:
    """The device type whose autocast settings hold for ``x``; meta tensors traced as a GPU's follow CUDA's."""
    return "cuda" if x.is_meta and is_on_gpu(x) else x.device.type


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for, or None where it is off."""
    kind = autocast_type(x)
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None
