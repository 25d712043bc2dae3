"""RISE: how sure the model is of a class, averaged over the random masks that show a pixel.

Axes: N images, T targets of each image, M masks, S cells along each side of a mask, H W pixels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcos_train.explanation.method.base import check_counts, explaining, perturbable, probabilities, select

__all__ = ["Rise"]


@dataclass(frozen=True)
class Rise:
    """Masks weighted by the probability of the target under them (Petsiuk et al., 2018, arXiv 1806.07421, eq. 6).

    A mask is a random S x S grid of zeros and ones, enlarged bilinearly to S+1 cells and cut out at a random place.
    The probabilities are the model's own: sigmoid or softmax, by the loss that it was trained with. All images and
    targets share the masks, all targets the forward passes. B-cos networks see the masked image encoded anew.

    Args:
        n_masks: M, 500 in the official evaluation.
        cells: S.
        p: probability of a one, in (0, 1].
        seed: of the masks.
        batch_size: masked images in one forward pass.
    """

    n_masks: int = 500
    cells: int = 8
    p: float = 0.1
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_counts(n_masks=self.n_masks, cells=self.cells, batch_size=self.batch_size)
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p}: above 0 and at most 1")

    def __call__(self, model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        to_probabilities = probabilities(model)
        with explaining(model, x, targets) as (x, targets), torch.no_grad():
            image, encode = perturbable(x)
            total = x.new_zeros(*targets.shape, *x.shape[2:])
            grids, shifts = self._draw(x)
            for chunk in range(0, self.n_masks, self.batch_size):
                part = slice(chunk, chunk + self.batch_size)
                masks = self._masks(grids[part], shifts[part], x)
                for n in range(len(x)):
                    probability = to_probabilities(model(encode(image[n] * masks[:, None])))
                    chosen = select(probability, targets[n].expand(len(masks), -1))
                    total[n] += (chosen.T @ masks.flatten(1)).unflatten(1, x.shape[2:])
            return total / (self.n_masks * self.p)

    def _draw(self, x: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
        """Grids (M, S, S) of zeros and ones, and where each mask begins in its enlarged grid."""
        # On the CPU, so that the masks are the same on every device.
        generator = torch.Generator().manual_seed(self.seed)
        grids = torch.rand(self.n_masks, self.cells, self.cells, generator=generator, device="cpu") < self.p
        tops, lefts = (
            torch.randint(self._cell(side), (self.n_masks,), generator=generator, device="cpu").tolist()
            for side in x.shape[2:]
        )
        return grids.to(x), list(zip(tops, lefts, strict=True))

    def _masks(self, grids: Tensor, shifts: list[tuple[int, int]], x: Tensor) -> Tensor:
        """(M, H, W) in [0, 1]."""
        height, width = x.shape[2:]
        size = [(self.cells + 1) * self._cell(side) for side in (height, width)]
        enlarged = F.interpolate(grids[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
        return torch.stack(
            [mask[top : top + height, left : left + width] for mask, (top, left) in zip(enlarged, shifts, strict=True)]
        )

    def _cell(self, side: int) -> int:
        return -(-side // self.cells)
