"""The batch that loaders yield."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        images: ``(N, 3, H, W)``, uint8 RGB.
        labels: ``(N,)``, int64.
        indices: ``(N,)``, int64, indices of the samples in the data set.
        extras: Further data for a task by name, such as boxes or a teacher's maps.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    extras: Mapping[str, object] | None = None
