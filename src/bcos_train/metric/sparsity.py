"""Sparsity of explanations."""

import torch
from torch import Tensor

__all__ = ["gini_index"]


def gini_index(attributions: Tensor) -> Tensor:
    """Compute the Gini index of |attribution|: 0 if all magnitudes are equal, 1 - 1/(H W) for a single pixel.

    With the n = H W magnitudes in ascending order, a_1 <= ... <= a_n, it is sum_k (2k - n - 1) a_k / (n sum_k a_k).
    Sources: Hurley & Rickard, "Comparing Measures of Sparsity" (2009, arXiv 0811.4706), eq. for the Gini index; for
    explanations Chalasani et al. (ICML 2020, arXiv 1810.06583), sec. 5. It depends on neither sign nor scale.

    Args:
        attributions: (*, H, W).

    Returns:
        (*) in [0, 1), float32 or float64. 0 for a map of zeros or with a NaN or an infinity.

    Raises:
        ValueError: Fewer than two axes.
    """
    if attributions.ndim < 2:
        raise ValueError(f"attributions must be (*, H, W), got {tuple(attributions.shape)}")
    magnitudes = attributions.to(torch.promote_types(attributions.dtype, torch.float32)).abs().flatten(-2)
    # Scaled by the largest value, no sum overflows; NaN now marks the maps without a score.
    magnitudes = (magnitudes / magnitudes.amax(-1, keepdim=True)).sort(-1).values
    n = magnitudes.shape[-1]
    ranks = torch.arange(1, n + 1, dtype=magnitudes.dtype, device=magnitudes.device)
    total = magnitudes.sum(-1)
    # Rounding may give a value just below 0.
    index = ((2 * ranks - n - 1) / n * magnitudes).sum(-1).clamp(min=0)
    return torch.where(total > 0, index / total, 0)
