"""Memory formats."""

import torch
from torch import Tensor

__all__ = ["memory_format"]


def memory_format(x: Tensor) -> torch.memory_format:
    """Channels last for a tensor (N, C, H, W) that is dense in that order and not in the usual one, else contiguous."""
    is_channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format
