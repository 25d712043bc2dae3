"""The batch that loaders yield."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

__all__ = ["Batch"]


class Batch(NamedTuple):
    """Images with their labels.

    Attributes:
        images: ``(N, 3, H, W)``, uint8 RGB.
        labels: ``(N,)``, int64; for data sets with several labels per image ``(N, K)``, float32, multi-hot.
        indices: ``(N,)``, int64, indices of the samples in the data set.
        extras: Further data for a task by name, such as a teacher's maps; ``None``: there is none.

            * ``"boxes"``, for data sets with boxes: int64 ``(N, M, 5)``, rows ``[class, x0, y0, x1, y1]`` in pixels of
              ``images``, half-open (x0 ≤ column < x1) and clipped to the image. Rows of class -1 are padding; M ≥ 1.
            * ``"groups"``, for data sets with groups: int64 ``(N,)``.
            * ``"teacher_logits"`` float32 ``(N, K)``, ``"teacher_maps"`` ``(N, C, h, w)`` of the whole images, and
              ``"window"`` float32 ``(N, 4)``, the part of the whole image that ``images`` shows (see
              :func:`~bcos_train.dataset.window.draw_window`): training batches with a frozen teacher.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    extras: Mapping[str, Tensor] | None = None
