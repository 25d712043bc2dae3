"""RISE: probability of a class, averaged over the random masks that show a pixel.

Axes: N images, T targets per image, M masks, S cells along each side of a mask, H W pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation.method.base import (
    attribution_context,
    check_positive_integers,
    image_and_encoder,
    probability_function,
    select_targets,
)

__all__ = ["Rise"]


@dataclass(frozen=True)
class Rise:
    """Average masks weighted by the masked image's target probability (Petsiuk et al., 2018, arXiv 1806.07421, eq. 6).

    A mask is a random S x S grid of zeros and ones, upsampled bilinearly to S+1 cells and cropped at a random offset.
    The probabilities follow the model's ``to_probabilities``: sigmoid or softmax, according to its training loss. All
    images and targets share the masks, and all targets the forward passes. The masked image is encoded again for B-cos
    networks.

    Args:
        n_masks: M, 500 in the official evaluation.
        cells: S.
        p: Probability of a one, in (0, 1].
        seed: Seeds the masks.
        batch_size: Masked images per forward pass.
    """

    n_masks: int = 500
    cells: int = 8
    p: float = 0.1
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_positive_integers(n_masks=self.n_masks, cells=self.cells, batch_size=self.batch_size)
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p}: above 0 and at most 1")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        to_probabilities = probability_function(model)
        with attribution_context(model, x, targets) as (x, targets), torch.no_grad():
            image, encode = image_and_encoder(x)
            total = x.new_zeros(*targets.shape, *x.shape[2:])
            grids, offsets = self._draw(x)
            for first in range(0, self.n_masks, self.batch_size):
                batch = slice(first, first + self.batch_size)
                masks = self._masks(grids[batch], offsets[batch], x)
                for n in range(len(x)):
                    probability = to_probabilities(model(encode(image[n] * masks[:, None])))
                    weights = select_targets(probability, targets[n].expand(len(masks), -1))
                    total[n] += (weights.T @ masks.flatten(1)).unflatten(1, x.shape[2:])
            return total / (self.n_masks * self.p)

    def _draw(self, x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Draw grids (M, S, S) of zeros and ones, and the offset (top, left) of each mask in its upsampled grid."""
        # Drawn on the CPU, so that the masks are the same on every device.
        generator = torch.Generator().manual_seed(self.seed)
        grids = torch.rand(self.n_masks, self.cells, self.cells, generator=generator, device="cpu") < self.p
        tops, lefts = (
            torch.randint(self._cell_size(side), (self.n_masks,), generator=generator, device="cpu").tolist()
            for side in x.shape[2:]
        )
        return grids.to(x), list(zip(tops, lefts, strict=True))

    def _masks(self, grids: Tensor, offsets: list[tuple[int, int]], x: Tensor) -> Tensor:
        """Upsample grids to masks (M, H, W) in [0, 1]."""
        height, width = x.shape[2:]
        size = [(self.cells + 1) * self._cell_size(side) for side in (height, width)]
        upsampled = F.interpolate(grids[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        corners = zip(upsampled, offsets, strict=True)
        return torch.stack([mask[top : top + height, left : left + width] for mask, (top, left) in corners])

    def _cell_size(self, side: int) -> int:
        """Return the side of a cell in pixels, rounded up."""
        return -(-side // self.cells)
