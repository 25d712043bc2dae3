"""Pareto fronts by hand, and against all pairs."""

import math

import pytest
import torch

from bcos_train.metric import pareto_front


def test_by_hand() -> None:
    scores = torch.tensor([[0.80, 0.50], [0.70, 0.60], [0.69, 0.59], [0.90, 0.10], [0.80, 0.40]])
    assert pareto_front(scores) == [0, 1, 3]


def test_rounding() -> None:
    """0.801 and 0.802 are both 0.8; the first of equal points is kept, also if a later one is a little better."""
    scores = torch.tensor([[0.801, 0.500], [0.802, 0.501], [0.799, 0.506]])
    assert pareto_front(scores) == [2]
    assert pareto_front(scores[:2]) == [0]
    assert pareto_front(scores[:2], resolution=0) == [1]
    assert pareto_front(scores, resolution=0) == [1, 2]


def test_points_without_a_score_are_left_out() -> None:
    assert pareto_front(torch.tensor([[0.9, math.nan], [0.1, 0.1]])) == [1]
    assert pareto_front(torch.zeros(0, 3)) == []


@pytest.mark.parametrize("resolution", [0.0, 0.1])
def test_against_all_pairs(resolution: float) -> None:
    scores = torch.rand(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = [[round(v / resolution) if resolution else v for v in row] for row in scores.tolist()]
    expected = [
        i
        for i, p in enumerate(points)
        if not any(
            all(b >= a for a, b in zip(p, q, strict=True)) and (q != p or j < i) for j, q in enumerate(points) if j != i
        )
    ]
    assert pareto_front(scores, resolution) == expected


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"scores must be \(P, M\), got \(3,\)"):
        pareto_front(torch.zeros(3))
    with pytest.raises(ValueError, match="resolution=-1: at least 0"):
        pareto_front(torch.zeros(3, 2), -1)
