"""Intersection over union by hand."""

import math

import pytest
import torch

from bcos_train.metric import iou_scores

MASK = torch.tensor([[True, True, False], [True, True, False]])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[9, 9, 0], [9, 9, 0]], 1.0),
        ([[8, 0, 8], [-9, -9, 0]], 1 / 5),
        ([[8, 4, 0], [4.01, 0, 0]], 2 / 4),  # 0.5 is not above the threshold
        ([[8, 8, 7], [6, 6, 5]], 2 / 5),  # from 5 to 8: 6.5 is the middle
        ([[-1, -2, -3], [-1, -1, 0]], 0.0),
        ([[0, 0, 0], [0, 0, 0]], 0.0),
        ([[2, 2, 2], [2, 2, 2]], 4 / 6),
        ([[2, 2, 2 - 1e-8], [2, 2, 2]], 4 / 6),
        ([[9, 9, math.nan], [9, 9, 0]], 0.0),
        ([[9, 9, 0], [math.inf, 9, 0]], 0.0),
    ],
)
def test_by_hand(values: list[list[float]], expected: float) -> None:
    maps = torch.tensor(values, dtype=torch.float64)
    assert iou_scores(maps, MASK).item() == pytest.approx(expected)
    assert iou_scores(maps.repeat(2, 3, 1, 1), MASK.repeat(2, 3, 1, 1)).shape == (2, 3)


def test_masks_and_thresholds() -> None:
    maps = torch.tensor([[9.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert iou_scores(maps, torch.zeros_like(MASK)).item() == 0
    assert iou_scores(maps, MASK, threshold=0.4).item() == pytest.approx(2 / 4)
    assert iou_scores(maps.bfloat16(), MASK).dtype == torch.float32
    with pytest.raises(ValueError, match=r"must have one shape"):
        iou_scores(maps, MASK[None])
