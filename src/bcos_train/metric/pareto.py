"""Pareto front: the best compromises between several scores.

Axes: P points, such as checkpoints, M scores.
"""

import torch
from torch import Tensor

__all__ = ["pareto_front"]


def pareto_front(scores: Tensor, resolution: float = 0.005) -> list[int]:
    """Return the points that no other point equals or exceeds in all scores.

    Scores are rounded first, so that differences below the noise of a measurement don't enlarge the front; of points
    that are then equal, the first is kept. Source: Rao et al. (ICCV 2023, arXiv 2303.11932) choose checkpoints by F1,
    energy pointing game and IoU so.

    Args:
        scores: (P, M), of which larger ones are better; points with NaN are left out.
        resolution: Scores are rounded to multiples of it; 0: not rounded.

    Returns:
        Indices of the points, in order.

    Raises:
        ValueError: The scores are not (P, M), or the resolution is negative.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be (P, M), got {tuple(scores.shape)}")
    if resolution < 0:
        raise ValueError(f"resolution={resolution}: at least 0")
    rounded = (scores.double() / resolution).round() if resolution else scores.double()
    # [p, q]: point q is at least as good as p in all scores.
    at_least = (rounded[None] >= rounded[:, None]).all(2)
    is_earlier = torch.ones_like(at_least).tril(-1)
    is_beaten = (at_least & (~at_least.T | is_earlier)).any(1)
    return (~is_beaten & ~scores.isnan().any(1)).nonzero()[:, 0].tolist()
