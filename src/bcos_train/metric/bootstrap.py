"""Bootstrap confidence intervals of a mean or median over samples."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bcos_train.utils.suggestions import join_words, suggest

__all__ = ["Interval", "bootstrap_interval"]

_STATISTICS = ("mean", "median")
_CHUNK_SIZE = 2**22  # values that are resampled at once


class Interval(NamedTuple):
    """Confidence interval, in units of the scores."""

    low: float
    high: float


def bootstrap_interval(
    scores: Tensor,
    statistic: Literal["mean", "median"] = "mean",
    *,
    confidence: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Compute a percentile bootstrap interval (Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, ch. 13).

    M samples are drawn with replacement from the M samples, ``n_resamples`` times. The interval spans the middle
    ``confidence`` of the resulting statistics, with linear interpolation. All scores of a sample (such as the cells of
    a grid) are drawn together, since they aren't independent.

    Args:
        scores: (M,) or (M, ...) for M samples; the statistic is taken over all scores.
        statistic: ``"mean"`` or ``"median"``; the median of an even number of scores is the mean of the middle two.
        confidence: Above 0 and below 1.
        n_resamples: At least 1.
        seed: Seeds the resampling; the global random state is neither used nor changed.

    Returns:
        (low, high), within the range of the scores. Both equal the score if there is one sample or all scores are
        equal; both are NaN if a score is not finite.

    Raises:
        ValueError: No scores, or an argument out of the ranges above.
    """
    if scores.ndim < 1 or scores.numel() == 0:
        raise ValueError(f"scores must be (M, ...) with at least one sample, got {tuple(scores.shape)}")
    if statistic not in _STATISTICS:
        raise ValueError(f"{statistic=} must be {join_words(_STATISTICS)}{suggest(str(statistic), _STATISTICS)}")
    if not 0 < confidence < 1 or n_resamples < 1:
        raise ValueError(f"{confidence=} must be between 0 and 1 and {n_resamples=} at least 1")
    values = scores.detach().cpu().double().flatten(1) if scores.ndim > 1 else scores.detach().cpu().double()[:, None]
    if not values.isfinite().all():
        return Interval(float("nan"), float("nan"))
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _CHUNK_SIZE // values.numel())
    statistics = []
    for first in range(0, n_resamples, rows):
        shape = (min(rows, n_resamples - first), len(values))
        resampled = values[torch.randint(len(values), shape, generator=generator)].flatten(1)
        statistics.append(resampled.mean(1) if statistic == "mean" else _median(resampled))
    tail = (1 - confidence) / 2
    bounds = torch.quantile(torch.cat(statistics), torch.tensor([tail, 1 - tail], dtype=values.dtype))
    # The mean of equal numbers may differ from them by rounding.
    low, high = bounds.clamp(values.min(), values.max()).tolist()
    return Interval(low, high)


def _median(values: Tensor) -> Tensor:
    """(R, M) -> (R,); torch.median would take the lower of the middle two."""
    ordered, n = values.sort(1).values, values.shape[1]
    return (ordered[:, (n - 1) // 2] + ordered[:, n // 2]) / 2
