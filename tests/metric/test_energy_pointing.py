"""The energy pointing game and the pointing game by hand and pixel by pixel; boxes as masks."""

import math

import pytest
import torch
from torch import Tensor

from bcos_train.metric import boxes_to_masks, energy_pointing_scores, pointing_game_scores

INF = math.inf


def slow_energy(attribution: Tensor, mask: Tensor) -> float:
    """Reference for one map, one pixel at a time."""
    inside = total = 0.0
    for y in range(attribution.shape[0]):
        for x in range(attribution.shape[1]):
            value = max(attribution[y, x].item(), 0.0)
            total += value
            inside += value if mask[y, x] else 0.0
    return inside / total if total > 0 else 0.0


def slow_pointing(attribution: Tensor, mask: Tensor) -> float:
    best = max(attribution.flatten().tolist())
    winners = [bool(mask[y, x]) for y, x in (attribution == best).nonzero().tolist()]
    return sum(winners) / len(winners) if best > 0 else 0.0


def random_maps(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 2, 5, 8, generator=generator, dtype=torch.float64)
    maps[0, 1] = maps[0, 1].round()  # several largest values
    maps[1, 0] = -maps[1, 0].abs()
    masks = torch.rand(3, 2, 5, 8, generator=generator) < 0.4
    return maps.to(dtype), masks


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["f64", "f32"])
@pytest.mark.parametrize(
    ("fast", "slow"),
    [(energy_pointing_scores, slow_energy), (pointing_game_scores, slow_pointing)],
    ids=["energy", "pointing"],
)
def test_equals_the_loop(fast, slow, dtype: torch.dtype, tolerance: float) -> None:
    maps, masks = random_maps(dtype)
    expected = [[slow(maps[n, t], masks[n, t]) for t in range(2)] for n in range(3)]
    scores = fast(maps, masks)
    assert scores.dtype == dtype
    assert torch.allclose(scores, torch.tensor(expected, dtype=dtype), atol=tolerance, rtol=0)
    assert torch.equal(fast(maps[2, 1], masks[2, 1]), scores[2, 1])  # one map alone
    with torch.inference_mode():
        assert torch.equal(fast(maps, masks), scores)


def test_by_hand() -> None:
    attribution = torch.tensor([[3.0, -7.0, 1.0], [0.0, 4.0, -1.0]])
    left = torch.tensor([[True, True, False], [True, False, False]])
    assert energy_pointing_scores(attribution, left).item() == 3 / 8
    assert energy_pointing_scores(attribution, ~left).item() == 5 / 8
    assert pointing_game_scores(attribution, left).item() == 0
    assert pointing_game_scores(attribution, ~left).item() == 1


@pytest.mark.parametrize("score", [energy_pointing_scores, pointing_game_scores])
@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [-1.0, -2.0], [math.nan, 1.0], [1.0, math.nan], [INF, 1.0], [-1.0, -INF]],
    ids=["zero", "negative", "nan-inside", "nan-outside", "infinite", "minus-infinite"],
)
def test_without_evidence_scores_0(score, values: list[float]) -> None:
    assert score(torch.tensor([values]), torch.tensor([[True, False]])).item() == 0


@pytest.mark.parametrize("score", [energy_pointing_scores, pointing_game_scores])
def test_empty_and_full_mask(score) -> None:
    maps = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(0))
    assert score(maps, torch.zeros(4, 3, 5, dtype=torch.bool)).tolist() == [0.0] * 4
    assert score(maps, torch.ones(4, 3, 5, dtype=torch.bool)).tolist() == [1.0] * 4


@pytest.mark.parametrize("scale", [1e-44, 1e-30, 1e37])
def test_scale_invariance(scale: float) -> None:
    maps = scale * torch.tensor([[8.0, 8.0, 8.0, 8.0]])
    assert energy_pointing_scores(maps, torch.tensor([[True, False, False, False]])).item() == pytest.approx(0.25)


def test_half_precision_is_summed_in_float32() -> None:
    maps = torch.full((1, 300, 300), 2.0, dtype=torch.float16)
    mask = torch.zeros(1, 300, 300, dtype=torch.bool)
    mask[:, :, :100] = True
    assert energy_pointing_scores(maps, mask).item() == pytest.approx(1 / 3, abs=1e-6)


def test_tied_largest_values_count_by_their_share() -> None:
    maps = torch.tensor([[2.0, 2.0, 2.0, 1.0]])
    assert pointing_game_scores(maps, torch.tensor([[True, True, False, True]])).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("score", [energy_pointing_scores, pointing_game_scores])
@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        (torch.ones(2, 3, 4), torch.ones(2, 4, 3).bool(), r"one shape \(\*, H, W\), got \(2, 3, 4\) and \(2, 4, 3\)"),
        (torch.ones(3, 4), torch.ones(1, 3, 4).bool(), r"\(3, 4\) and \(1, 3, 4\)"),
        (torch.ones(4), torch.ones(4).bool(), r"\(\*, H, W\)"),
        (torch.ones(3, 4), torch.ones(3, 4), "masks must be bool, got torch.float32"),
    ],
    ids=["transposed", "batch", "one-axis", "float-mask"],
)
def test_mistakes(score, maps: Tensor, masks: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(maps, masks)


# Boxes.


def test_boxes_by_hand() -> None:
    masks = boxes_to_masks([[(1, 0, 3, 1)], [], [(0, 0, 1, 2), (3, 1, 4, 2)]], height=2, width=4)
    assert masks.dtype == torch.bool
    assert masks.int().tolist() == [
        [[0, 1, 1, 0], [0, 0, 0, 0]],
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 0, 0, 1]],
    ]


@pytest.mark.parametrize(
    ("box", "columns"),
    [
        ((0.4, 0, 2.5, 1), [1, 1, 0, 0]),
        ((0.6, 0, 2.6, 1), [0, 1, 1, 0]),
        ((-5, -5, 99, 99), [1, 1, 1, 1]),
        ((4, 0, 9, 1), [0, 0, 0, 0]),
        ((2, 0, 2, 1), [0, 0, 0, 0]),
    ],
    ids=["fractions", "centers", "beyond-the-image", "outside", "empty"],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_pixels_whose_centers_are_inside(box: tuple[float, ...], columns: list[int], as_tensor: bool) -> None:
    boxes = torch.tensor([box]) if as_tensor else [box]
    assert boxes_to_masks([boxes], 1, 4)[0, 0].int().tolist() == columns


@pytest.mark.parametrize(
    "boxes",
    [[(2, 0, 1, 1)], [(0, 0, 1)], [(0, 0, math.nan, 1)], (0, 0, 1, 1)],
    ids=["reversed", "three-numbers", "nan", "no-list"],
)
def test_wrong_boxes(boxes) -> None:
    with pytest.raises(ValueError, match=r"boxes of an image must be \[\(x0, y0, x1, y1\), ...\] with x0 <= x1"):
        boxes_to_masks([boxes], 2, 2)
