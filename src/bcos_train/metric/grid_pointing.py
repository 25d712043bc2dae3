"""Grid pointing game (GridPG): localization of the evidence for a class in a grid of images.

Images of distinct classes form a grid of n x n cells, and each of these classes is explained on the whole grid. Its
score is the share of the positive contributions that lies in its own cell. A uniform explanation scores 1/n² (Böhle et
al., "Convolutional Dynamic Alignment Networks", CVPR 2021, arXiv 2104.00032, sec. 4; as evaluated for B-cos networks in
arXiv 2306.10898, sec. 5).

Axes: G grids, K = n² cells of a grid in reading order, C channels, H W pixels of a cell, M images of the data set.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GridPointing", "choose_grids", "compose_grids", "grid_pointing_scores"]

PERCENTILES = (25, 50, 75, 100)


@dataclass(frozen=True)
class GridPointing:
    """Scores of all cells of all grids.

    Attributes:
        scores: (G, K), each in [0, 1].
    """

    scores: Tensor

    @property
    def uniform(self) -> float:
        """Score of a uniform explanation: 1/K."""
        return 1 / self.scores.shape[1]

    def summary(self) -> dict[str, float]:
        """Return ``mean``, ``p25``, ``p50`` (the published figure), ``p75``, ``p100``, ``uniform`` and ``n_grids``.

        Without grids, mean and percentiles are NaN.
        """
        scores = self.scores.cpu().double()
        if len(scores) == 0:
            scores = scores.new_full((1, 1), float("nan"))
        quantiles = torch.quantile(scores.flatten(), torch.tensor(PERCENTILES, dtype=scores.dtype) / 100)
        return {
            "mean": scores.mean().item(),
            **{f"p{p}": value.item() for p, value in zip(PERCENTILES, quantiles, strict=True)},
            "uniform": self.uniform,
            "n_grids": len(self.scores),
        }


def choose_grids(
    labels: Tensor,
    predictions: Tensor,
    confidences: Tensor,
    n: int,
    n_grids: int,
    *,
    threshold: float = 0.5,
    seed: int = 42,
) -> Tensor:
    """Choose the images of each grid.

    Only correctly classified images with a confidence above the threshold are used, each once and the most confident
    of a class first. The classes of a grid are drawn at random among those with unused images.

    Args:
        labels, predictions: (M,) integers.
        confidences: (M,) probabilities of the predicted classes: sigmoid of the logit for networks trained with binary
            cross-entropy, softmax for others.
        n: Cells along each side.
        n_grids: Number of grids.
        threshold: In [0, 1]; 0 uses every correctly classified image.
        seed: Seeds the draw of the classes.

    Returns:
        (G, K) int64 indices into the M images, with G <= ``n_grids``: fewer grids, possibly none, if there are too few
        images.

    Raises:
        ValueError: ``n`` or ``n_grids`` below 1, a threshold outside [0, 1], or shapes that differ.
    """
    if n < 1 or n_grids < 1 or not 0 <= threshold <= 1:
        raise ValueError(f"{n=} and {n_grids=} must be at least 1 and {threshold=} in [0, 1]")
    if not labels.shape == predictions.shape == confidences.shape or labels.ndim != 1:
        shapes = [tuple(t.shape) for t in (labels, predictions, confidences)]
        raise ValueError(f"labels, predictions and confidences must have one shape (M,), got {shapes}")
    usable = ((labels == predictions) & (confidences > threshold)).nonzero()[:, 0]
    # Stable, so that equally confident images keep the order of the data set.
    usable = usable[confidences[usable].argsort(descending=True, stable=True)]
    unused: dict[int, list[int]] = {}
    for index in reversed(usable.tolist()):
        unused.setdefault(int(labels[index]), []).append(index)
    random = np.random.RandomState(seed)
    grids: list[list[int]] = []
    while len(grids) < n_grids and len(unused) >= n * n:
        classes = random.choice(sorted(unused), size=n * n, replace=False).tolist()
        grids.append([unused[label].pop() for label in classes])
        unused = {label: indices for label, indices in unused.items() if indices}
    return torch.tensor(grids, dtype=torch.long).reshape(-1, n * n)


def compose_grids(images: Tensor) -> Tensor:
    """Tile the images of each grid: (G, K, C, H, W) -> (G, C, n H, n W), cells in reading order.

    Raises:
        ValueError: K is not a square number.
    """
    n_grids, n_cells, channels, height, width = images.shape
    n = _cells_per_side(n_cells)
    cells = images.view(n_grids, n, n, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(n_grids, channels, n * height, n * width)


def grid_pointing_scores(attributions: Tensor, smooth: int = 15) -> Tensor:
    """Compute the share of each class's positive attribution that lies in the class's own cell.

    Args:
        attributions: (G, K, n H, n W); entry k of axis 1 is the map of the class whose image is in cell k.
        smooth: Odd kernel size in pixels of the average pooling before negative values are set to 0; 1: no pooling.

    Returns:
        (G, K) in [0, 1]; 0 where no value is positive, or where the map contains a NaN or an infinity.

    Raises:
        ValueError: K is not a square number, the size is not a multiple of n, or an even or non-positive ``smooth``.
    """
    if attributions.ndim != 4:
        raise ValueError(f"attributions must be (G, K, H, W), got {tuple(attributions.shape)}")
    n_grids, n_cells, height, width = attributions.shape
    n = _cells_per_side(n_cells)
    if height % n or width % n:
        raise ValueError(f"maps of {height}x{width} pixels can't be divided into {n}x{n} cells")
    if smooth < 1 or smooth % 2 == 0:
        raise ValueError(f"{smooth=}: a positive odd number")
    if smooth > 1:
        # Separable: the window over rows, then over columns.
        for kernel, padding in (((smooth, 1), (smooth // 2, 0)), ((1, smooth), (0, smooth // 2))):
            attributions = F.avg_pool2d(attributions, kernel, stride=1, padding=padding)
    positive = attributions.clamp(min=0).view(n_grids, n_cells, n, height // n, n, width // n)
    shares = positive.mean((3, 5)).flatten(2)
    total, inside = shares.sum(2), shares.diagonal(dim1=1, dim2=2)
    return torch.where((total > 0) & total.isfinite(), inside / total, 0)


def _cells_per_side(n_cells: int) -> int:
    n = round(n_cells**0.5)
    if n * n != n_cells or n < 1:
        raise ValueError(f"{n_cells} cells don't make a square grid: 1, 4, 9, ...")
    return n
