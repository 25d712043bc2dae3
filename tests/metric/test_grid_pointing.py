"""The grid pointing game against a loop-by-loop transcription of its definition, and by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bcos_train.metric import GridPointing, choose_grids, compose_grids, grid_pointing_scores


def slow_scores(attributions: Tensor, smooth: int) -> Tensor:
    """The definition, one pixel at a time."""
    n_grids, n_cells, height, width = attributions.shape
    n = math.isqrt(n_cells)
    scores = torch.zeros(n_grids, n_cells, dtype=attributions.dtype)
    for g in range(n_grids):
        for k in range(n_cells):
            energy = [0.0] * n_cells
            for y in range(height):
                for x in range(width):
                    reach = smooth // 2
                    total = 0.0
                    for dy in range(-reach, reach + 1):
                        for dx in range(-reach, reach + 1):
                            if 0 <= y + dy < height and 0 <= x + dx < width:
                                total += attributions[g, k, y + dy, x + dx].item()
                    value = total / smooth**2
                    if value > 0:
                        energy[y * n // height * n + x * n // width] += value
            if sum(energy) > 0:
                scores[g, k] = energy[k] / sum(energy)
    return scores


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("smooth", [1, 3, 5])
def test_equals_the_definition(n: int, smooth: int) -> None:
    maps = torch.randn(2, n * n, 6 * n, 4 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert torch.allclose(grid_pointing_scores(maps, smooth), slow_scores(maps, smooth), atol=1e-12)
    assert torch.allclose(grid_pointing_scores(maps.float(), smooth).double(), slow_scores(maps, smooth), atol=1e-6)


def test_by_hand() -> None:
    # Cells of 1x1 pixels: reading order, negative values count as 0.
    maps = torch.tensor([[[[3.0, 1.0], [0.0, -9.0]], [[3, 1], [0, 0]], [[-1, -1], [-1, -1]], [[0, 0], [0, 2]]]])
    assert grid_pointing_scores(maps, smooth=1).tolist() == [[0.75, 0.25, 0.0, 1.0]]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_no_positive_attribution_scores_0(value: float) -> None:
    maps = torch.full((1, 4, 4, 4), value)
    assert grid_pointing_scores(maps, smooth=3).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_non_finite_value_affects_its_map_only(value: float) -> None:
    maps = torch.ones(1, 4, 4, 4)
    maps[0, 2, 3, 3] = value
    assert grid_pointing_scores(maps, smooth=1).tolist() == [[0.25, 0.25, 0.0, 0.25]]


def test_uniform_attribution_scores_one_over_the_number_of_cells() -> None:
    result = GridPointing(grid_pointing_scores(torch.ones(3, 9, 12, 12), smooth=1))
    assert torch.allclose(result.scores, torch.tensor(1 / 9))
    assert result.uniform == pytest.approx(1 / 9)


def test_summary() -> None:
    summary = GridPointing(torch.tensor([[0.0, 0.2, 0.4, 0.6], [0.8, 1.0, 1.0, 0.4]])).summary()
    assert summary == pytest.approx(
        {"mean": 0.55, "p25": 0.35, "p50": 0.5, "p75": 0.85, "p100": 1.0, "uniform": 0.25, "n_grids": 2}
    )


def test_summary_without_grids() -> None:
    summary = GridPointing(torch.zeros(0, 9)).summary()
    assert summary["n_grids"] == 0
    assert summary["uniform"] == pytest.approx(1 / 9)
    assert all(math.isnan(summary[key]) for key in ("mean", "p25", "p50", "p75", "p100"))


def test_compose_grids_in_reading_order() -> None:
    images = torch.arange(4.0)[None, :, None, None, None].expand(1, 4, 2, 1, 2)
    grid = compose_grids(images)
    assert grid.shape == (1, 2, 2, 4)
    assert grid[0, 1].tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_a_map_of_the_own_image_scores_1() -> None:
    images = torch.rand(2, 9, 1, 5, 7)
    own = images[:, :, None] * torch.eye(9)[None, :, :, None, None, None]  # (G, class, cell, C, H, W)
    maps = torch.stack([compose_grids(own[:, k])[:, 0] for k in range(9)], 1)
    assert torch.equal(grid_pointing_scores(maps, smooth=1), torch.ones(2, 9))


@pytest.mark.parametrize(
    ("maps", "smooth", "message"),
    [
        (torch.ones(1, 5, 4, 4), 1, "5 cells don't make a square grid"),
        (torch.ones(1, 4, 5, 4), 1, "5x4 pixels can't be divided into 2x2 cells"),
        (torch.ones(1, 4, 4, 4), 2, "smooth=2: a positive odd number"),
        (torch.ones(4, 4, 4), 1, r"must be \(G, K, H, W\), got \(4, 4, 4\)"),
    ],
)
def test_mistakes(maps: Tensor, smooth: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_pointing_scores(maps, smooth)


# Choice of images.


@pytest.fixture
def data_set() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (400,), generator=generator)
    wrong = torch.rand(400, generator=generator) < 0.2
    predictions = torch.where(wrong, (labels + 1) % 10, labels)
    return labels, predictions, torch.rand(400, generator=generator)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_images_of_the_grids(data_set: tuple[Tensor, Tensor, Tensor], n: int, threshold: float) -> None:
    labels, predictions, confidences = data_set
    grids = choose_grids(*data_set, n, 8, threshold=threshold)
    assert grids.shape == (8, n * n)
    assert len(set(grids.flatten().tolist())) == grids.numel()
    for grid in grids:
        assert len(set(labels[grid].tolist())) == n * n
        assert torch.equal(labels[grid], predictions[grid])
        assert (confidences[grid] > threshold).all()
    for label in range(10):  # the most confident first, none skipped
        used = [i for i in grids.flatten().tolist() if labels[i] == label]
        usable = ((labels == label) & (predictions == label) & (confidences > threshold)).nonzero()[:, 0]
        expected = usable[confidences[usable].argsort(descending=True)][: len(used)]
        assert used == expected.tolist()


def test_seed(data_set: tuple[Tensor, Tensor, Tensor]) -> None:
    first = choose_grids(*data_set, 2, 5)
    assert torch.equal(first, choose_grids(*data_set, 2, 5, seed=42))
    assert not torch.equal(first, choose_grids(*data_set, 2, 5, seed=43))
    assert torch.equal(first[:3], choose_grids(*data_set, 2, 3))


def test_fewer_grids_where_images_do_not_suffice() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    assert sorted(choose_grids(labels, labels, torch.full((7,), 0.9), 2, 10)[0].tolist()) == [0, 1, 2, 3]
    assert choose_grids(labels, labels, torch.full((7,), 0.9), 2, 10).shape == (1, 4)
    assert choose_grids(labels, labels, torch.full((7,), 0.5), 2, 10).shape == (0, 4)
    assert choose_grids(labels, labels, torch.full((7,), 0.9), 3, 10).shape == (0, 9)


def slow_choice(labels: Tensor, predictions: Tensor, confidences: Tensor, n: int, threshold: float) -> list[list[int]]:
    """Reference: the official evaluation, which stops one grid too early, as soon as only n² classes are left."""
    sorted_of_class: dict[int, list[tuple[float, int]]] = {}
    for i in range(len(labels)):
        if labels[i] == predictions[i]:
            sorted_of_class.setdefault(int(labels[i]), []).append((-confidences[i].item(), i))
    classes = np.array(sorted(sorted_of_class))
    next_of_class = dict.fromkeys(classes.tolist(), 0)

    def usable(label: int) -> bool:
        images = sorted(sorted_of_class[label])
        return next_of_class[label] < len(images) and -images[next_of_class[label]][0] > threshold

    grids, random = [], np.random.RandomState(42)
    while sum(usable(label) for label in classes) > n * n:
        grid = []
        for label in random.choice(classes[[usable(label) for label in classes]], size=n * n, replace=False):
            grid.append(sorted(sorted_of_class[label])[next_of_class[label]][1])
            next_of_class[label] += 1
        grids.append(grid)
    return grids


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_grids_are_the_official_ones(data_set: tuple[Tensor, Tensor, Tensor], n: int, threshold: float) -> None:
    expected = slow_choice(*data_set, n, threshold)
    grids = choose_grids(*data_set, n, 1000, threshold=threshold)
    assert len(expected) > 5
    assert len(grids) >= len(expected)
    assert grids[: len(expected)].tolist() == expected
