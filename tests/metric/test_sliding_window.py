"""Windows over a large image, against one window at a time and by hand."""

import pytest
import torch
from torch import Tensor, nn

from bcos_train.explanation.method.linear import Bcos
from bcos_train.metric import SlidingWindow, compose_grids, grid_pointing_scores
from bcos_train.nn import BcosConv2d, BcosLinear


class FixedSize(nn.Module):
    """Model that only accepts 8 x 8 pixels, like a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = BcosConv2d(6, 4, 4, stride=4)
        self.drop = nn.Dropout(0.5)
        self.head = BcosLinear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.patches(x)).flatten(1))


@pytest.fixture
def case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    image = torch.rand(2, 3, 13, 19, dtype=torch.float64)
    return FixedSize().double().eval(), torch.cat([image, 1 - image], 1), torch.tensor([[0, 3, 3], [4, 1, 0]])


@pytest.mark.parametrize(("stride", "tops", "lefts"), [
    (8, (0, 5), (0, 8, 11)),
    (5, (0, 5), (0, 5, 10, 11)),
    (3, (0, 3, 5), (0, 3, 6, 9, 11)),
    (1, range(6), range(12)),
])  # fmt: skip
def test_equals_one_window_at_a_time(case, stride: int, tops, lefts) -> None:
    model, x, targets = case
    expected, coverage = torch.zeros(2, 3, 13, 19, dtype=torch.float64), torch.zeros(13, 19)
    for top in tops:
        for left in lefts:
            coverage[top : top + 8, left : left + 8] += 1
            for n in range(2):
                window = x[n : n + 1, :, top : top + 8, left : left + 8]
                expected[n, :, top : top + 8, left : left + 8] += Bcos()(model, window, targets[n : n + 1])[0]
    assert coverage.min() >= 1
    for batch_size in (1, 5, 1000):
        maps = SlidingWindow(Bcos(), 8, stride, batch_size)(model, x, targets)
        assert torch.allclose(maps, expected / coverage, atol=1e-12)


def test_by_hand() -> None:
    def count(model: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        """Fill each window with its first pixel, which identifies it."""
        return x[:, :1, :1, :1].expand(-1, 1, *x.shape[2:])

    x = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 3, 5)
    maps = SlidingWindow(count, 3, 1)(nn.Identity(), x, torch.tensor([[0]]))
    # Windows from 0, 1 and 2: the pixels see 0; 0, 1; 0, 1, 2; 1, 2; 2.
    assert maps[0, 0].tolist() == [[0.0, 0.5, 1.0, 1.5, 2.0]] * 3
    maps = SlidingWindow(count, 3, 3)(nn.Identity(), x, torch.tensor([[0]]))
    assert maps[0, 0].tolist() == [[0.0, 0.0, 1.0, 2.0, 2.0]] * 3  # windows from 0 and 2


def test_one_window_is_the_method_itself(case) -> None:
    model, x, targets = case
    x = x[:, :, 2:10, 3:11]
    assert torch.equal(SlidingWindow(Bcos(), 8, 4)(model, x, targets), Bcos()(model, x, targets))


def test_a_grid_of_windows_side_by_side_is_its_images(case) -> None:
    model, _, _ = case
    image = torch.rand(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.cat([image, 1 - image], 2)
    targets = torch.tensor([[0, 1, 2, 3]])
    maps = SlidingWindow(Bcos(), 8, 8)(model, compose_grids(images), targets)
    single = Bcos()(model, images[0], targets.expand(4, 4))  # (cell, class, H, W)
    expected = torch.stack([compose_grids(single[None, :, k, None])[0, 0] for k in range(4)])
    assert torch.allclose(maps[0], expected)
    assert grid_pointing_scores(maps, smooth=1).shape == (1, 4)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_model_is_unchanged(case, untouched, training: bool, inference: bool) -> None:
    model, x, targets = case
    method = SlidingWindow(Bcos(), 8, 4)
    expected = method(model, x, targets)
    model.train(training)
    with untouched(model), torch.inference_mode(inference):
        maps = method(model, x.clone(), targets.clone())
    assert torch.equal(maps, expected)
    assert maps.dtype == torch.float64
    assert not maps.requires_grad
    assert method(model.float(), x.float(), targets).dtype == torch.float32


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, 1), "size=0: an integer of at least 1"),
        ((8, 0), "stride=0: an integer of at least 1"),
        ((8, 9), "stride=9 would skip pixels between windows: at most size=8"),
        ((8, 8, 0), "batch_size=0: an integer of at least 1"),
    ],
    ids=str,
)
def test_wrong_numbers(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingWindow(Bcos(), *numbers)


def test_wrong_shapes(case) -> None:
    model, x, targets = case
    method = SlidingWindow(Bcos(), 8, 8)
    with pytest.raises(ValueError, match="image of 7x19 pixels is smaller than a window of 8x8"):
        method(model, x[:, :, :7], targets)
    with pytest.raises(ValueError, match=r"x must be .*\(N, C, H, W\)"):
        method(model, x[0], targets)
    with pytest.raises(ValueError, match=r"targets must be integers \(2, T\)"):
        method(model, x, targets[0])
