"""Occlusion: decrease of a logit when a window of the image is covered.

Axes: N images, T targets per image, R C rows and columns of windows, k side of a window, H W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import (
    attribution_context,
    check_positive_integers,
    image_and_encoder,
    image_variant_batches,
    select_targets,
)

__all__ = ["Occlusion"]


@dataclass(frozen=True)
class Occlusion:
    """Distribute the decrease of the logit evenly over the pixels of a window, and sum over all windows.

    Source: Zeiler & Fergus, 2014, arXiv 1311.2901, sec. 4.2. A window is covered with zeros: black for B-cos networks,
    whose image is encoded again, and the mean color for standardized RGB. Window centers are at multiples of the
    stride. Windows are cropped at the border; their remaining pixels share the whole decrease. (In the official
    evaluation a window of size k covers k-1 pixels, and all six channels are set to zero.)

    Args:
        kernel: k, the side of a window in pixels, odd.
        stride: Distance between window centers in pixels.
        batch_size: Covered images per forward pass.
    """

    kernel: int = 9
    stride: int = 2
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive_integers(kernel=self.kernel, stride=self.stride, batch_size=self.batch_size)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: an odd number, so that a window has a center")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with attribution_context(model, x, targets) as (x, targets), torch.no_grad():
            image, encode = image_and_encoder(x)
            rows, columns = (self._window_masks(side, x) for side in x.shape[2:])  # (R, H), (C, W)
            batches = zip(x.split(self.batch_size), targets.split(self.batch_size), strict=True)
            logits = torch.cat([select_targets(model(x_batch), target_batch) for x_batch, target_batch in batches])
            decreases = logits.new_zeros(*targets.shape, len(rows) * len(columns))
            for n, v in image_variant_batches(len(x), decreases.shape[2], self.batch_size, x.device):
                r, c = v // len(columns), v % len(columns)
                is_covered = (rows[r, :, None] * columns[c, None, :]).bool()
                covered = image[n].masked_fill(is_covered[:, None], 0)
                decreases[n, :, v] = logits[n] - select_targets(model(encode(covered)), targets[n])
            shares = decreases.unflatten(2, (len(rows), len(columns))) / (rows.sum(1)[:, None] * columns.sum(1))
            # Windows are separable into rows and columns, and so is the sum over them.
            return rows.T @ shares @ columns

    def _window_masks(self, side: int, x: Tensor) -> Tensor:
        """Return masks (windows, side): 1 on the pixels of a window, 0 elsewhere."""
        pixels = torch.arange(side, device=x.device)
        centers = pixels[:: self.stride]
        return ((pixels - centers[:, None]).abs() <= self.kernel // 2).to(x.dtype)
