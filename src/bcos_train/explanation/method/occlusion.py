"""Occlusion: what a logit loses when a window of the image is covered.

Axes: N images, T targets of each image, R C rows and columns of windows, k side of a window, H W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bcos_train.explanation.method.base import check_counts, explaining, pairs, perturbable, select

__all__ = ["Occlusion"]


@dataclass(frozen=True)
class Occlusion:
    """The loss of logit, shared evenly among the pixels of a window and summed over the windows that hold a pixel.

    Source: Zeiler & Fergus, 2014, arXiv 1311.2901, sec. 4.2. A window is covered with zeros: black for B-cos networks,
    whose image is encoded anew, the mean colour for standardised RGB. Its centre is at a multiple of the stride, and
    it is cut off at the border; the pixels that are left share its whole effect. (In the official evaluation a
    window of size k covers k-1 pixels, and all six channels are set to zero.)

    Args:
        kernel: k, the side of a window in pixels, odd.
        stride: between the centres, in pixels.
        batch_size: covered images in one forward pass.
    """

    kernel: int = 9
    stride: int = 2
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(kernel=self.kernel, stride=self.stride, batch_size=self.batch_size)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel}: an odd number, so that a window has a centre")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        with explaining(model, x, targets) as (x, targets), torch.no_grad():
            image, encode = perturbable(x)
            rows, columns = (self._windows(side, x) for side in x.shape[2:])  # (R, H), (C, W)
            parts = zip(x.split(self.batch_size), targets.split(self.batch_size), strict=True)
            whole = torch.cat([select(model(part), of_part) for part, of_part in parts])
            losses = whole.new_zeros(*targets.shape, len(rows) * len(columns))
            for n, v in pairs(len(x), losses.shape[2], self.batch_size, x.device):
                r, c = v // len(columns), v % len(columns)
                is_covered = (rows[r, :, None] * columns[c, None, :]).bool()
                covered = image[n].masked_fill(is_covered[:, None], 0)
                losses[n, :, v] = whole[n] - select(model(encode(covered)), targets[n])
            shares = losses.unflatten(2, (len(rows), len(columns))) / (rows.sum(1)[:, None] * columns.sum(1))
            # Windows are products of an interval of rows and one of columns, and so is the sum over them.
            return rows.T @ shares @ columns

    def _windows(self, side: int, x: Tensor) -> Tensor:
        """(windows, side): 1 where a window covers, 0 elsewhere."""
        pixels = torch.arange(side, device=x.device)
        centres = pixels[:: self.stride]
        return ((pixels - centres[:, None]).abs() <= self.kernel // 2).to(x.dtype)
